"""The implicit adjoint: derivatives of y*(θ) from F(y*(θ), θ) = 0 alone.

Differentiating F(y*(θ), θ) = 0 gives J dy = −(∂F/∂θ) dθ with J = ∂F/∂y. Hence

    reverse:  Jᵀ w = ȳ,   θ̄ = −(∂F/∂θ)ᵀ w
    forward:  J ẏ = −(∂F/∂θ) θ̇

(Krantz & Parks, The Implicit Function Theorem, 2002). Both rules are written in differentiable torch
and evaluated at the *output* y*, which carries its own node in the graph: differentiating a rule
differentiates y*(θ) in it by the same rule, so derivatives of every order are exact by recursion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final, get_args

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core._autocast import autocast_is_on, without_autocast
from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.rule import ImplicitRule
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError, SingularJacobianError, UnsupportedTransformError
from invlayer_core.jacobians.blocks import check_chunk_size
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.linear.auto import Auto
from invlayer_core.linear.factor_bank import FactorBank
from invlayer_core.linear.iterative import Krylov
from invlayer_core.linear.lu import solve_recorded
from invlayer_core.linear.methods import LU, LinearSolver, Lstsq
from invlayer_core.linear.solve import SingularPolicy
from invlayer_core.linear.sparse_lu import SparseLU, registered_linear_solver
from invlayer_core.structure import SystemShape

__all__ = ["Implicit"]

_POLICIES = get_args(SingularPolicy)


@final
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Exact derivatives of every order by the implicit function theorem.

    Parameters
    ----------
    singular : {"raise", "consistent", "lstsq", "damped", "nan", "zero"}
        What a sample gives whose Jacobian is singular at the solution: an error; the minimum-norm answer
        where the linear system has one and an error elsewhere (redundant equations, dependent
        constraints); the minimum-norm least-squares answer; a Tikhonov-damped one; NaN; or zero.
    damping : float
        The Tikhonov parameter of ``singular="damped"``, in the units of the Jacobian. Regular samples
        are never damped.
    linear_solver : LinearSolver, "auto" or a registered name
        How J is solved with: :class:`~invlayer_core.linear.LU`, ``Cholesky`` or ``Lstsq``; a matrix-free
        method such as ``GMRES``, which never forms J; or :class:`~invlayer_core.linear.SparseLU`, which a
        registered name such as ``"scipy.splu"`` stands for. ``"auto"`` is
        :class:`~invlayer_core.linear.Auto`. A sample on which a matrix-free method does not converge counts
        as singular; it then has no ``"lstsq"`` or ``"damped"`` answer.
    chunk_size : int, optional
        Most rows of the Jacobian blocks that are taken in one pass through F, for the derivative and for
        solvers that ask for J. A pass holds what F computes for B samples that many times over, so that a
        small number bounds memory; results are the same. By default as many as a processor's caches hold,
        or 256 MiB of them on a device.

    Raises
    ------
    ConditionsError
        For an unknown policy, linear solver or chunk size, or for settings that do not go together.

    Examples
    --------
    >>> Implicit(singular="lstsq").singular
    'lstsq'
    """

    singular: SingularPolicy = "raise"
    damping: float = 1e-6
    linear_solver: LinearSolver | str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_chunk_size("Implicit", self.chunk_size)
        if self.singular not in _POLICIES:
            raise ConditionsError(
                f"Implicit(singular={self.singular!r}): accepted are {', '.join(map(repr, _POLICIES))}."
            )
        if isinstance(self.linear_solver, str) and "." in self.linear_solver:  # a registered name
            object.__setattr__(self, "linear_solver", registered_linear_solver(self.linear_solver))
        if self.linear_solver != "auto" and not isinstance(self.linear_solver, LinearSolver):
            raise ConditionsError(
                f"Implicit(linear_solver={self.linear_solver!r}): accepted are 'auto', an instance from "
                "inv.linear, such as GMRES(), or a registered linear solver's name, such as 'scipy.splu'."
            )
        if isinstance(self.linear_solver, Lstsq) and self.singular not in ("raise", "lstsq"):
            raise ConditionsError(
                f"Implicit(singular={self.singular!r}, linear_solver=Lstsq()): Lstsq has an answer for every "
                "sample, so no policy comes into play. Accepted with it are singular='raise' and 'lstsq'."
            )
        without_blocks = isinstance(self.linear_solver, (Krylov, SparseLU))
        if without_blocks and self.singular in ("consistent", "lstsq", "damped"):
            raise ConditionsError(
                f"Implicit(singular={self.singular!r}, linear_solver={self.linear_solver!r}): that answer "
                "needs the dense Jacobian. Accepted with a Krylov method or SparseLU are 'raise', 'nan' and "
                "'zero'; or take LU()."
            )

    def method(self, shape: SystemShape, dtype: torch.dtype) -> LinearSolver:
        """The linear solver for systems of this shape."""
        if not isinstance(self.linear_solver, (str, Auto)):
            return self.linear_solver
        if self.singular in ("consistent", "lstsq", "damped"):  # whose answers need blocks
            return LU()
        return self._auto.choose(shape, dtype)

    def describe(self, shape: SystemShape, dtype: torch.dtype) -> str:
        method = self.method(shape, dtype)
        automatic = method is not self.linear_solver
        return f"{method} (auto: {self._auto.reason(shape, dtype)})" if automatic else str(method)

    @property
    def _auto(self) -> Auto:
        return self.linear_solver if isinstance(self.linear_solver, Auto) else Auto()

    def attach(self, solved: Solved) -> Tensor:
        system, y, dead = solved.system, solved.y, solved.dead
        if _functorch.forward_mode_depth() >= 2:
            return self._attach_by_newton(system, y, dead)
        factors = FactorBank() if solved.factors is None else solved.factors
        rule = ImplicitRule(self, system, solved.dead_value, factors, solved.certified)
        theta = system.theta
        if torch._C._len_torch_function_stack():
            # Inside the conditions of an outer layer, which may be watching or swapping tensors: the
            # inputs of a Function are hidden from it, those of an ordinary operation are not.
            theta = tuple(tensor.view_as(tensor) for tensor in theta)
        result: Tensor = _functorch.apply(_ImplicitFunction, rule, y, dead, *theta)
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
        if Auto().choose(system.shape, y.dtype).matrix_free:
            raise _nested_forward_too_large(system.shape)
        order = _functorch.transform_depth() + 2  # and up to two plain backward passes outside
        for _ in range(order.bit_length()):
            linearization = linearize(system, y, system.theta)
            blocks = per_sample_blocks(linearization)
            if isinstance(self.linear_solver, Lstsq) or blocks.shape[-1] != blocks.shape[-2]:
                raise _nested_forward_without_inverse()
            residual = system.residual(y, system.theta).reshape(blocks.shape[:-1])
            step = solve_recorded(blocks, residual)
            if not bool(_functorch.plain(step).isfinite().all()):
                raise _singular_in_nested_forward(_functorch.plain(step))
            y = y - step.reshape(y.shape)
        return y


def _singular_in_nested_forward(step: Tensor) -> SingularJacobianError:
    bad = (~step.isfinite()).any(-1).reshape(-1).nonzero().reshape(-1).tolist()
    return SingularJacobianError(
        "the Jacobian of the conditions is singular at the solution of "
        f"{', '.join(f'sample {i}' for i in bad[:5])} under nested forward mode (jacfwd of jacfwd), where no "
        "policy has an answer. Accepted are regular samples, or reverse mode on one side (jacfwd of jacrev)."
    )


def _nested_forward_with_failures() -> ConditionsError:
    return ConditionsError(
        "nested forward mode (jacfwd of jacfwd) over a batch with failed samples is not defined; accepted "
        "is on_failure='raise', or reverse mode on the outside (jacfwd of jacrev)."
    )


def _nested_forward_without_inverse() -> UnsupportedTransformError:
    return UnsupportedTransformError(
        "nested forward mode (jacfwd of jacfwd) needs a Jacobian with an inverse; least-squares derivatives "
        "have no exact rule there. Accepted is reverse mode on one side (jacfwd of jacrev)."
    )


def _nested_forward_too_large(shape: SystemShape) -> UnsupportedTransformError:
    return UnsupportedTransformError(
        f"nested forward mode (jacfwd of jacfwd) forms dense Jacobians, which for {shape.count} systems of "
        f"{shape.size} unknowns would take more than 1 GiB. Accepted is reverse mode on one side (jacfwd of "
        "jacrev), which keeps to the linear solver."
    )


@final
@_functorch.with_cached_signature
class _ImplicitFunction(torch.autograd.Function):
    """(y*, θ) ↦ y*, with the implicit rules as its derivatives with respect to θ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: ImplicitRule, y: Tensor, dead: Tensor | None, *theta: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, _, dead, *theta = inputs
        # The output, not the input: it has a node in the graph (see the module's docstring).
        ctx.save_for_backward(output, dead, *theta)
        ctx.save_for_forward(output, dead, *theta)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if autocast_is_on():
            with without_autocast():
                return _ImplicitFunction.backward(ctx, cotangent)
        y, dead, *theta = _functorch.revive(ctx.saved_tensors)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.rule.pullback(y, dead, theta, cotangent, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        if autocast_is_on():
            with without_autocast():
                return _ImplicitFunction.jvp(ctx, *tangents)
        y, dead, *theta = _functorch.revive(ctx.saved_tensors)
        result: Tensor = ctx.rule.pushforward(y, dead, theta, tangents[3:])
        return result
