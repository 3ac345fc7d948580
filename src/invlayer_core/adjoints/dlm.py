"""Direct loss minimisation: the derivative of a minimum as a difference of two gradients.

Let y(ε) minimise f(y, θ) + ε ⟨v, y⟩. By the envelope theorem the derivative of that minimum with respect to
θ is ∂f/∂θ at y(ε), and differentiating once more by ε,

    θ̄ = ∂/∂θ ⟨v, y*(θ)⟩ = d/dε ∂f/∂θ (y(ε), θ) at ε = 0,

of which a difference quotient is taken (McAllester, Hazan & Keshet, Direct Loss Minimization for Structured
Prediction, 2010; for least squares Pineda et al., Theseus, 2022, section 3.3). y(ε) is one Newton step from
y*, which costs one linear solve, or another run of the solver, which wants no Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core._autocast import autocast_is_on, without_autocast
from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.failed import out_of_harm
from invlayer_core.adjoints.first_order import refuse_nested_forward_mode, without_second_derivative
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.recorded import answer_for_failed
from invlayer_core.adjoints.rule import ImplicitRule
from invlayer_core.conditions.perturbed import pushed
from invlayer_core.conditions.stationarity import HalfSquares, StationarityConditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import (
    ConditionsError,
    ConvergenceWarning,
    UnsupportedTransformError,
    warn_user,
)
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.structure import Arguments

__all__ = ["DLM"]

Resolve = Callable[[System, Tensor], Tensor]

_ENOUGH = 0.1  # of the push: how exactly a perturbed problem has to be solved


@final
@dataclass(frozen=True)
class DLM(Adjoint):
    """First derivatives of a minimum by perturbing its objective with the cotangent.

    The cotangent of every sample is scaled to length 1, and ε is what the gradient of the objective is pushed
    by. The error is of order ε, with ``central`` of order ε²; rounding adds about 1e-16 / ε. Nothing but
    ∂f/∂θ at two points is asked of f beside its Hessian; with ``resolve`` not even that.

    Parameters
    ----------
    epsilon : float
    central : bool
        Steps to both sides.
    resolve : bool
        Solve the perturbed problem by the solver of the forward, instead of one Newton step. It has to be a
        registered one, since a function of your own does not know the perturbed objective; and to be
        accurate to much less than ε.
    hessian : {"full", "gauss_newton"}
        What the step is taken with. ``"gauss_newton"``, for least squares, is what Theseus does: no second
        derivative at all, and an error that stays as ε → 0 wherever residuals do.
    dtype : torch.dtype or None
        What the difference is taken in, y and args being converted; None leaves them as they are.

    Raises
    ------
    ConditionsError
        If a parameter is out of range, or for a problem that is neither ``minimize`` nor ``least_squares``.
    UnsupportedTransformError
        For a second derivative, and in forward mode.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> a = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    >>> f = lambda y, a: (y.exp() - a * y).sum(-1)
    >>> for epsilon in (1e-1, 1e-3, 1e-5):
    ...     adjoint = inv.adjoints.DLM(epsilon, central=True)
    ...     y = inv.minimize(f, torch.zeros(1, dtype=torch.float64), a, adjoint=adjoint)
    ...     print(f"{torch.autograd.grad(y, a)[0].item():.8f}")
    0.33333333
    0.33333333
    0.33333333
    """

    epsilon: float = 1e-2
    central: bool = False
    resolve: bool = False
    hessian: Literal["full", "gauss_newton"] = "full"
    dtype: torch.dtype | None = torch.float64

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise ConditionsError(f"DLM(epsilon={self.epsilon!r}): accepted is a number above 0.")
        if self.hessian not in ("full", "gauss_newton"):
            raise ConditionsError(f"DLM(hessian={self.hessian!r}): accepted are 'full' and 'gauss_newton'.")
        if self.resolve and self.hessian != "full":
            raise ConditionsError(
                f"DLM(resolve=True, hessian={self.hessian!r}): a problem that is solved again has no step, "
                "and no use for a Hessian. Leave one of them out."
            )

    @property
    def needs_resolve(self) -> bool:
        return self.resolve

    def attach(self, solved: Solved) -> Tensor:
        refuse_nested_forward_mode(repr(self))
        system = solved.system
        rule = _Rule(self, system, self._conditions_of(system), solved.dead_value, solved.resolve)
        theta = system.theta
        if torch._C._len_torch_function_stack():  # as in Implicit: seen by the conditions of an outer layer
            theta = tuple(tensor.view_as(tensor) for tensor in theta)
        result: Tensor = _functorch.apply(_PerturbedFunction, rule, solved.y, solved.dead, *theta)
        return result

    def _conditions_of(self, system: System) -> StationarityConditions:
        conditions = system.function
        if not isinstance(conditions, StationarityConditions):
            raise ConditionsError(
                f"adjoint={self!r} perturbs an objective, and the conditions "
                f"{getattr(conditions, '__qualname__', type(conditions).__name__)!r} have none. Accepted are "
                "minimize and least_squares; for any other problem take adjoint=Implicit()."
            )
        if self.hessian == "gauss_newton" and not conditions.is_squares:
            raise ConditionsError(
                f"adjoint={self!r} came with minimize, whose objective has no residuals. Accepted is "
                "least_squares; or hessian='full'."
            )
        return conditions

    def describe(self, *_: object) -> str:
        return "none: the solver runs again" if self.resolve else f"LU of the {self.hessian} Hessian"


@final
@dataclass(frozen=True)
class _Rule:
    """The difference quotient at (y*, θ)."""

    settings: DLM
    system: System
    conditions: StationarityConditions
    dead_value: float
    again: Resolve | None

    def pullback(
        self,
        y: Tensor,
        dead: Tensor | None,
        theta: Sequence[Tensor],
        cotangent: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        if dead is not None and bool(_functorch.plain(dead).all()):
            rule = ImplicitRule(Implicit(), self.system, self.dead_value)
            return rule.pullback(y, dead, theta, cotangent, wanted)
        y, theta, flat = y.detach(), [tensor.detach() for tensor in theta], cotangent.detach()
        if dead is not None:
            y, theta = out_of_harm(self.system, y, dead, theta)
        y, flat, raised = self._raised(y), self._raised(flat), [self._raised(t) for t in theta]
        length = flat.norm(dim=-1, keepdim=True)
        push = flat / torch.where(length > 0, length, torch.ones_like(length))
        weight = length.squeeze(-1)
        if dead is not None:
            push = torch.where(dead.unsqueeze(-1), torch.zeros_like(push), push)
            weight = torch.where(dead, answer_for_failed(weight, self.dead_value), weight)
        near, far, distance = self._points(y, push, raised)
        weight = weight / distance
        ahead = self._slope(far, raised, weight, wanted)
        behind = self._slope(near, raised, weight, wanted)
        pairs = zip(theta, ahead, behind, strict=True)
        return tuple(None if a is None or b is None else (a - b).to(t.dtype) for t, a, b in pairs)

    def _raised(self, tensor: Tensor) -> Tensor:
        dtype = self.settings.dtype
        if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)

    def _points(self, y: Tensor, push: Tensor, theta: list[Tensor]) -> tuple[Tensor, Tensor, float]:
        """Between which two points the difference is taken, and how far the push is between them."""
        epsilon = self.settings.epsilon
        if self.settings.resolve:
            far = self._solved(y, push, theta)
            return (
                (self._solved(y, -push, theta), far, 2 * epsilon)
                if self.settings.central
                else (y, far, epsilon)
            )
        step = epsilon * self._newton_step(y, push, theta)
        return (y + step, y - step, 2 * epsilon) if self.settings.central else (y, y - step, epsilon)

    def _newton_step(self, y: Tensor, push: Tensor, theta: list[Tensor]) -> Tensor:
        """H⁻¹ v."""
        rule = ImplicitRule(Implicit(), self.system, self.dead_value)
        if self.settings.hessian == "gauss_newton":
            assert isinstance(self.conditions.objective, HalfSquares)
            residuals = replace(
                self.system, function=self.conditions.objective.residuals, jacobian=None, reads_all=False
            )
            jacobian = per_sample_blocks(linearize(residuals, y, theta), check=True)
            blocks = (jacobian.mT @ jacobian).detach()
            linearization = linearize(self.system, y, theta)
        else:
            linearization = linearize(self.system, y, theta)
            blocks = per_sample_blocks(linearization, check=True).detach()
        rhs = push.reshape(blocks.shape[:-1])
        return rule.solve(linearization, blocks, rhs).detach().reshape(y.shape)

    def _solved(self, y: Tensor, push: Tensor, theta: list[Tensor]) -> Tensor:
        """The minimum of the pushed objective, by the solver of the forward."""
        assert self.again is not None
        split = len(self.system.arguments.tensors)
        args = self.system.arguments.unflatten(theta[:split])
        conditions = pushed(self.conditions, self.settings.epsilon)
        system = replace(
            self.system, function=conditions, arguments=Arguments.flatten((*args, push, y)), jacobian=None,
            parts=conditions.parts, reads_all=False,
        )  # fmt: skip
        found = self.again(system, y)
        self._check(system, found)
        return found.to(y.dtype)

    def _check(self, system: System, found: Tensor) -> None:
        """Warn where the perturbed problem was not solved to a fraction of the push."""
        with torch.no_grad():
            left = system.residual(found, system.theta).abs().amax(-1)
        bad = _functorch.plain(~(left <= _ENOUGH * self.settings.epsilon)).reshape(-1)
        if bool(bad.any()):
            worst = float(_functorch.plain(left).max())
            warn_user(
                f"adjoint={self.settings!r}: the perturbed problems of samples "
                f"{bad.nonzero().reshape(-1).tolist()[:5]} were solved to {worst:.1e} only, and "
                f"the difference is taken over {self.settings.epsilon:.1e}: the derivative may be off by as "
                "much as itself. Accepted is a fraction of epsilon: tighten the solver's own tolerance "
                "(options=), or take a larger epsilon.",
                ConvergenceWarning,
            )

    def _slope(
        self, y: Tensor, theta: list[Tensor], weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """∂/∂θ of the sum of w f(y, θ) over the samples."""
        objective = replace(self.system, function=self.conditions.objective, jacobian=None, reads_all=False)
        return linearize(objective, y, theta, wanted).pullback(weight, wanted, check=False).theta


@final
@_functorch.with_cached_signature
class _PerturbedFunction(torch.autograd.Function):
    """(y*, θ) ↦ y*, with the difference quotient as its derivative with respect to θ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: _Rule, y: Tensor, dead: Tensor | None, *theta: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, y, dead, *theta = inputs
        ctx.save_for_backward(y, dead, *theta)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if autocast_is_on():
            with without_autocast():
                return _PerturbedFunction.backward(ctx, cotangent)
        y, dead, *theta = _functorch.revive(ctx.saved_tensors)
        pulled = ctx.rule.pullback(y, dead, theta, cotangent, ctx.needs_input_grad[3:])
        called = repr(ctx.rule.settings)
        return (
            None,
            None,
            None,
            *(
                None if found is None else without_second_derivative(found, tensor, called)
                for found, tensor in zip(pulled, theta, strict=True)
            ),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise UnsupportedTransformError(
            f"forward mode (torch.func.jvp, jacfwd, forward_ad) through adjoint={ctx.rule.settings!r}, which "
            "perturbs the objective by a cotangent. Accepted is reverse mode; or adjoint=Implicit()."
        )
