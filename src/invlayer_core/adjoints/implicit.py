"""The implicit adjoint: derivatives of y*(θ) from F(y*(θ), θ) = 0 alone.

Differentiating F(y*(θ), θ) = 0 gives J dy = −(∂F/∂θ) dθ with J = ∂F/∂y. Hence

    reverse:  Jᵀ w = ȳ,   θ̄ = −(∂F/∂θ)ᵀ w
    forward:  J ẏ = −(∂F/∂θ) θ̇

(Krantz & Parks, The Implicit Function Theorem, 2002). Both rules are written in differentiable torch
and evaluated at the *output* y*, which carries its own node in the graph: differentiating a rule
differentiates y*(θ) in it by the same rule, so derivatives of every order are exact by recursion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.linear.refine import explain_inaccurate, refine
from invlayer_core.linear.singular import Diagnosis, diagnose
from invlayer_core.linear.solve import SingularPolicy, SolveRequest, solve_blocks

__all__ = ["Adjoint", "Implicit"]

_POLICIES = ("raise", "lstsq", "damped", "nan", "zero")


class Adjoint(ABC):
    """The rule by which derivatives cross the solve."""

    @abstractmethod
    def attach(self, system: System, y: Tensor, dead: Tensor | None, dead_value: float) -> Tensor:
        """``y`` again, now a differentiable function of ``system.theta``.

        Parameters
        ----------
        system : System
        y : Tensor of shape ``(*batch, *event)``
            The solution, without gradient.
        dead : Tensor of shape ``(*batch,)`` or None
            Samples that failed, and whose derivative is ``dead_value``.
        dead_value : float
            0 or NaN. A zero cotangent gives zero either way.
        """


@final
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Exact derivatives of every order by the implicit function theorem.

    Parameters
    ----------
    singular : {"raise", "lstsq", "damped", "nan", "zero"}
        What a sample gives whose Jacobian is singular at the solution: an error; the minimum-norm
        least-squares answer; a Tikhonov-damped one; NaN; or zero.
    damping : float
        The Tikhonov parameter of ``singular="damped"``, in the units of the Jacobian. Regular samples
        are never damped.

    Raises
    ------
    ConditionsError
        For an unknown policy.

    Examples
    --------
    >>> Implicit(singular="lstsq").singular
    'lstsq'
    """

    singular: SingularPolicy = "raise"
    damping: float = 1e-6

    def __post_init__(self) -> None:
        if self.singular not in _POLICIES:
            raise ConditionsError(
                f"Implicit(singular={self.singular!r}): accepted are {', '.join(map(repr, _POLICIES))}."
            )

    def attach(self, system: System, y: Tensor, dead: Tensor | None, dead_value: float) -> Tensor:
        if _functorch.forward_mode_depth() >= 2:
            return self._attach_by_newton(system, y, dead)
        rule = _Rule(self, system, dead_value)
        result: Tensor = _functorch.apply(_ImplicitFunction, rule, y, dead, *system.theta)
        return result

    def _attach_by_newton(self, system: System, y: Tensor, dead: Tensor | None) -> Tensor:
        """Newton steps recorded by torch, for nested forward mode.

        torch runs a custom jvp rule with forward mode switched off, so ``jacfwd(jacfwd(...))`` through
        one silently gives zeros. A Newton step from the exact y* instead is plain torch: each one
        doubles the order to which its result agrees with y*(θ) (its error is squared), so k steps make
        all derivatives up to order 2ᵏ − 1 exact.
        """
        if dead is not None:
            raise _nested_forward_with_failures()
        order = _functorch.transform_depth() + 2  # and up to two plain backward passes outside
        for _ in range(order.bit_length()):
            linearization = linearize(system, y, system.theta)
            blocks = per_sample_blocks(linearization)
            residual = system.residual(y, system.theta).reshape(blocks.shape[:-1])
            factors, pivots, _info = torch.linalg.lu_factor_ex(blocks)
            step = torch.linalg.lu_solve(factors, pivots, residual.unsqueeze(-1))
            y = y - step.reshape(y.shape)
        return y


def _nested_forward_with_failures() -> ConditionsError:
    return ConditionsError(
        "nested forward mode (jacfwd of jacfwd) over a batch with failed samples is not defined; accepted "
        "is on_failure='raise', or reverse mode on the outside (jacfwd of jacrev)."
    )


@final
@dataclass(frozen=True)
class _Rule:
    """The two derivative rules, at a point (y*, θ) given by torch."""

    settings: Implicit
    system: System
    dead_value: float

    def pullback(
        self,
        y: Tensor,
        dead: Tensor | None,
        theta: Sequence[Tensor],
        cotangent: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        if y.numel() == 0:
            return tuple(torch.zeros_like(t) if want else None for t, want in zip(theta, wanted, strict=True))
        linearization = self._linearize(y, dead, theta, wanted, [cotangent])
        blocks = per_sample_blocks(linearization, uneven=True)
        flat = cotangent.reshape(self.system.shape.count, self.system.shape.size)
        weights, decided, rhs = self._solve(linearization, blocks, flat, dead, transpose=True)
        pulled = linearization.pullback(-weights, wanted)
        if pulled.y is None or self._holds(pulled.y, rhs, decided):
            return pulled.theta
        explain_inaccurate(linearization, blocks)
        weights = refine(blocks, weights, rhs)
        return linearization.pullback(-weights, wanted).theta

    def _holds(self, pulled: Tensor, rhs: Tensor, decided: Tensor | None) -> bool:
        """Whether Jᵀw = ȳ, with J as F itself pulls back: it certifies the blocks and the solve at once."""
        with torch.no_grad():
            gap = (pulled.reshape(rhs.shape) + rhs).abs().amax(-1)
            size = rhs.abs().amax(-1)
            bad = (gap > torch.finfo(rhs.dtype).eps ** 0.6 * size) & size.isfinite()
            if decided is not None:
                bad = bad & ~decided
            return not bool(_functorch.plain(bad).any())

    def pushforward(
        self, y: Tensor, dead: Tensor | None, theta: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> Tensor:
        if y.numel() == 0:
            return torch.zeros_like(y)
        given = [tangent is not None for tangent in tangents]
        linearization = self._linearize(y, dead, theta, given, [t for t in tangents if t is not None])
        blocks = per_sample_blocks(linearization, check=True)
        moved = linearization.pushforward(tangents).reshape(self.system.shape.count, -1)
        return -self._solve(linearization, blocks, moved, dead, transpose=False)[0].reshape(y.shape)

    def _linearize(
        self,
        y: Tensor,
        dead: Tensor | None,
        theta: Sequence[Tensor],
        wanted: Sequence[bool],
        directions: Sequence[Tensor],
    ) -> Linearization:
        create_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (y, *theta, *directions))
        if dead is not None:
            y, theta = _out_of_harm(self.system, y, dead, theta)
        return linearize(self.system, y, theta, wanted, create_graph=create_graph)

    def _solve(
        self,
        linearization: Linearization,
        blocks: Tensor,
        rhs: Tensor,
        dead: Tensor | None,
        *,
        transpose: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, the samples that a policy answered, and the right-hand side that was solved for."""
        exempt = None
        if dead is not None:
            exempt = dead.reshape(-1)
            mask = exempt.unsqueeze(-1)
            identity = torch.eye(*blocks.shape[-2:], dtype=blocks.dtype, device=blocks.device)
            blocks = torch.where(mask.unsqueeze(-1), identity, blocks)
            rhs = torch.where(mask, _dead_answer(rhs, self.dead_value), rhs)
        request = SolveRequest(
            blocks=blocks,
            rhs=rhs,
            transpose=transpose,
            singular=self.settings.singular,
            damping=self.settings.damping,
            diagnose=lambda: self._diagnose(linearization, blocks.detach()),
            exempt=exempt,
        )
        x, singular = solve_blocks(request)
        decided = exempt if singular is None else singular if exempt is None else singular | exempt
        return x, decided, rhs

    def _diagnose(self, linearization: Linearization, blocks: Tensor) -> Diagnosis:
        y, theta, shape = (
            linearization.y.detach(),
            [t.detach() for t in linearization.theta],
            self.system.shape,
        )

        def jacobian_at(point: Tensor) -> Tensor:
            moved = linearize(self.system, point.reshape(shape.full), theta)
            return per_sample_blocks(moved).detach()

        flat = y.reshape(shape.count, shape.size)
        residual = self.system.residual(y, theta).detach().reshape(shape.count, -1)
        return diagnose(blocks, flat, residual, self._noise(y, theta, blocks), jacobian_at)

    def _noise(self, y: Tensor, theta: Sequence[Tensor], blocks: Tensor) -> Tensor:
        """The rounding error of F(y, θ): a few units in the last place of each term that enters it.

        The sizes of the terms are not visible, but the changes that F undergoes when y and θ are scaled
        are: alternating signs and uneven weights keep terms from cancelling, as they do in F itself.
        """
        floating = [t.is_floating_point() for t in theta]
        tangents = [_uneven(t) if real else None for t, real in zip(theta, floating, strict=True)]
        flat = y.reshape(blocks.shape[0], -1)
        of_theta = (
            linearize(self.system, y, theta, floating).pushforward(tangents).reshape(blocks.shape[0], -1)
        )
        of_y = (blocks @ _uneven(flat).unsqueeze(-1)).squeeze(-1)
        return 4.0 * torch.finfo(y.dtype).eps * (of_theta.detach().abs() + of_y.abs())


def _uneven(tensor: Tensor) -> Tensor:
    steps = torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)
    return (
        tensor.detach() * (1.0 + 0.3 * torch.sin(steps)) * torch.where(steps % 2 == 0, 1.0, -1.0).to(tensor)
    )


def _dead_answer(rhs: Tensor, value: float) -> Tensor:
    """``value`` for a failed sample, or zero where nothing is asked of it."""
    return torch.where(rhs == 0, torch.zeros_like(rhs), torch.full_like(rhs, value))


def _out_of_harm(
    system: System, y: Tensor, dead: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Where F can be linearised without NaN from failed samples reaching shared parameters.

    A failed sample gets the y of a good one, and what is not finite in θ becomes 1: only failed samples
    can depend on it. Their rows are then multiplied by zero, and 0 · finite = 0.
    """
    rows = y.reshape(system.shape.count, -1)
    good = torch.argmin(dead.reshape(-1).to(torch.uint8))
    donor = torch.index_select(rows, 0, good.reshape(1))
    donor = torch.where(donor.isfinite(), donor, torch.zeros_like(donor))
    safe = torch.where(dead.reshape(-1, 1), donor, rows).reshape(y.shape)
    return safe, [
        torch.where(t.isfinite(), t, torch.ones_like(t)) if t.is_floating_point() else t for t in theta
    ]


@final
@_functorch.with_cached_signature
class _ImplicitFunction(torch.autograd.Function):
    """(y*, θ) ↦ y*, with the implicit rules as its derivatives with respect to θ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: _Rule, y: Tensor, dead: Tensor | None, *theta: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, _, dead, *theta = inputs
        # The output, not the input: it has a node in the graph (see the module's docstring).
        ctx.save_for_backward(output, dead, *theta)
        ctx.save_for_forward(output, dead, *theta)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        y, dead, *theta = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.rule.pullback(y, dead, theta, cotangent, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        y, dead, *theta = ctx.saved_tensors
        result: Tensor = ctx.rule.pushforward(y, dead, theta, tangents[3:])
        return result
