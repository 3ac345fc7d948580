"""The linear solve of the two rules with a sparse J, differentiable to every order.

As without a matrix (``linear/matrix_free.py``): the solution x of A x = b, A = J or Jᵀ at (y, θ), is a root
of A(y, θ) x − b, and the implicit adjoint differentiates it by (y, θ, b). Its own Jacobian is A again, so
that every order is solved with the factors of the first. What is differentiated is F, not the pattern's
values: a pattern may name the non-zeros at y* alone, and second derivatives are still exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import UnsupportedTransformError
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.linear.factor_bank import FactorBank, apply_factors
from invlayer_core.linear.matrix_free import LinearResidual
from invlayer_core.linear.methods import LinearSolver
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.linear.sparse_singular import is_large
from invlayer_core.linear.sparse_solve import SparseSolve, solve_sparse
from invlayer_core.structure import Arguments, SystemShape

if TYPE_CHECKING:
    from invlayer_core.adjoints.implicit import Implicit

__all__ = ["SharedSparseLU", "pull_by_known_factors", "solve_by_sparse_factors"]

_PASSES = 3  # through F, before more care is taken


@final
@dataclass(frozen=True)
class SharedSparseLU(LinearSolver):
    """SparseLU for the conditions A(y, θ) x − b = 0 of a linear solve: its Jacobian is A, factorised already.

    Attributes
    ----------
    method : SparseLU
    bank : FactorBank
    system : System
        The conditions whose Jacobian A is.
    transposed : bool
        Whether A is its transpose.
    exempt : Tensor of bool or None
    """

    needs_blocks = False

    method: SparseLU
    bank: FactorBank
    system: System
    transposed: bool
    exempt: Tensor | None

    @property
    def matrix_free(self) -> bool:
        return False


def solve_by_sparse_factors(
    settings: Implicit,
    linearization: Linearization,
    method: SparseLU | SharedSparseLU,
    bank: FactorBank,
    rhs: Tensor,
    exempt: Tensor | None,
    *,
    transpose: bool,
    attach: Callable[[LinearSolver, System, Tensor], Tensor],
) -> Tensor:
    """x with A x = rhs, ``(B, n)``, differentiable where the linearization is.

    Parameters
    ----------
    settings : Implicit
    linearization : Linearization
        Of the conditions at hand: those of the user, or those of a linear solve.
    method : SparseLU or SharedSparseLU
    bank : FactorBank
        Of the conditions at hand; a shared method brings its own.
    rhs : Tensor of shape ``(B, n)``
    exempt : Tensor of bool, shape ``(B,)``, or None
    transpose : bool
    attach : callable
        ``(method, system, x) -> x``, differentiable by ``system.theta`` with that linear solver.
    """
    system, theta, inner = linearization.system, (linearization.y, *linearization.theta), linearization
    if isinstance(method, SharedSparseLU):
        bank, exempt, transpose = method.bank, method.exempt, transpose != method.transposed
        system, theta, method = method.system, tuple(linearization.theta[1:]), method.method
        inner = _relinearize(system, theta)
    differentiable = _functorch.is_active() or linearization.differentiable or rhs.requires_grad
    if differentiable and _functorch.is_mapped_by_autograd(rhs):
        if torch.is_grad_enabled() or any(_functorch.has_tangent(tensor) for tensor in theta):
            raise UnsupportedTransformError(_MAPPED)
        differentiable = False  # an outer forward mode is open, but nothing here is part of it
    x = solve_sparse(SparseSolve(inner, method, bank, transpose, settings.singular, exempt), rhs)
    if not differentiable:
        return x
    conditions = System(
        LinearResidual(system, transpose, exempt),
        Arguments.flatten((rhs, *theta)),
        SystemShape(x.shape[:1], x.shape[1:]),
    )
    return attach(SharedSparseLU(method, bank, system, transpose, exempt), conditions, x)


@torch.no_grad()
def pull_by_known_factors(
    linearization: Linearization, bank: FactorBank, cotangent: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...] | None:
    """θ̄ by factors that are there already; None where there are none, or anything looks odd.

    w with Jᵀw = ȳ is pulled back to θ and to y at once: what arrives at y certifies w, and tells what a step
    of refinement has to add. So factors that fit cost one pass through F, and those of the last Newton step
    two.

    Parameters
    ----------
    linearization : Linearization
    bank : FactorBank
    cotangent : Tensor of shape ``(B, n)``
        ȳ, plain.
    wanted : sequence of bool
    """
    factors = bank.factors or bank.handed
    count = linearization.system.shape.count
    if linearization.differentiable or len(factors) != count or any(factor is None for factor in factors):
        return None
    goal = (torch.finfo(cotangent.dtype).eps ** 0.8) * cotangent.norm(dim=-1, keepdim=True)
    w, missing = torch.zeros_like(cotangent), cotangent
    for _ in range(_PASSES):
        w = w + apply_factors(factors, missing, transpose=True)
        pulled = linearization.pullback(-w, wanted)
        if pulled.y is None:
            return None
        missing = cotangent + pulled.y.reshape(cotangent.shape)
        solved = missing.norm(dim=-1, keepdim=True) <= goal  # False for NaN
        if bool(solved.all()):
            return None if bool(is_large(w, cotangent).any()) else pulled.theta
        missing = torch.where(solved, 0.0, missing)
    return None


def _relinearize(system: System, point: Sequence[Tensor]) -> Linearization:
    y, *theta = (tensor.detach() for tensor in point)
    return linearize(system, y, theta)


_MAPPED = (
    "autograd.grad(..., is_grads_batched=True, create_graph=True) through SparseLU: torch would drop the "
    "graph of the result without a word. Accepted are torch.func (jacrev, vmap), which maps and records at "
    "once, or create_graph=False."
)
