"""The reverse rule in the common case, a regular batch: few operations, and one question to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.unchanged import Certified, refuse_changed, shift
from invlayer_core.errors import PerformanceWarning, warn_user
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.jacobians.per_sample import weighed_blocks
from invlayer_core.linear.cholesky import cholesky_solve
from invlayer_core.linear.lu import lu_factor, lu_solve, lu_solve_once
from invlayer_core.linear.methods import Cholesky, LinearSolver, Lstsq
from invlayer_core.linear.singular import suspicious_growth

__all__ = ["allowed_gap", "is_plain", "largest", "pull_at_once"]


def pull_at_once(
    linearization: Linearization,
    flat: Tensor,
    wanted: Sequence[bool],
    method: LinearSolver,
    certified: Certified | None = None,
) -> tuple[Tensor | None, ...] | None:
    """θ̄ for the cotangent ``flat`` ``(B, n)``; None where anything looks odd.

    The blocks come weighed by powers of two (:func:`weighed_blocks`), which the right-hand side takes up;
    the answer is −w, so that no sign has to be changed on the way.
    """
    if isinstance(method, Lstsq) or not is_plain(flat):
        return None
    blocks, weights = weighed_blocks(linearization)
    if blocks.shape[-1] != blocks.shape[-2]:
        return None
    rhs = flat.neg() if weights is None else flat * -weights
    solution = _solved(linearization, blocks, rhs, method)
    pulled = linearization.pullback(solution, wanted, check=linearization.system.measurable)
    back = (blocks.mT @ solution.unsqueeze(-1)) if pulled.y is None else pulled.y
    moved = shift(linearization, certified)
    still = certified.atol if certified is not None else 0.0
    if _all_hold(back.reshape(flat.shape) + flat, solution, flat, moved, still):
        return pulled.theta
    if isinstance(method, Cholesky):
        refuse_changed(linearization, certified, None)
        warn_user(_NOT_FOR_CHOLESKY, PerformanceWarning)
    return None


def _solved(linearization: Linearization, blocks: Tensor, rhs: Tensor, method: LinearSolver) -> Tensor:
    # Jᵀ is factorised, and not J: rows of a pass are its columns, which is how LAPACK wants a matrix.
    matrix = blocks.mT
    if linearization.differentiable:
        return lu_solve(matrix, rhs, lu_factor(matrix))
    return cholesky_solve(blocks, rhs) if isinstance(method, Cholesky) else lu_solve_once(matrix, rhs)


def _all_hold(gap: Tensor, solution: Tensor, flat: Tensor, moved: Tensor | None, still: float) -> bool:
    """Whether every sample's gap, and the growth of its solution, are small beside its cotangent.

    And whether F, which has changed by ``moved`` since its solution was certified, is the same to ``still``.
    """
    small, growth = allowed_gap(flat.dtype), suspicious_growth(flat.dtype)
    if flat.shape[0] == 1:  # a few numbers, which the host compares sooner than a device does
        vectors = (gap, solution, flat) if moved is None else (gap, solution, flat, moved)
        sizes = torch.linalg.vector_norm(torch.cat(vectors).detach(), torch.inf, dim=-1).tolist()
        size = sizes[2]
        fine_gap = sizes[0] <= small * size and sizes[1] <= growth * size  # False for NaN
        return bool(fine_gap and (moved is None or sizes[3] <= still))
    allowed = largest(flat.detach())
    fine = largest(gap.detach()) <= small * allowed  # False for NaN
    fine &= largest(solution.detach()) <= growth * allowed
    if moved is not None:
        fine &= largest(moved) <= still
    return bool(fine.all())


_NOT_FOR_CHOLESKY = (
    "Cholesky() did not solve the linear system of the derivative, and LU took its place: the Jacobian of "
    "the conditions is not symmetric positive definite, or nearly singular. Give linear_solver=LU() instead."
)


def is_plain(cotangent: Tensor) -> bool:
    """Whether no transform maps or pushes this pass; that it is recorded is no matter."""
    return not (
        _functorch.is_active() or _functorch.in_forward_mode() or _functorch.is_mapped_by_autograd(cotangent)
    )


def allowed_gap(dtype: torch.dtype) -> float:
    """How far Jᵀw may be from ȳ, relative to it, before the solve is looked into: 4e-10 in float64."""
    return float(torch.finfo(dtype).eps ** 0.6)


def largest(vectors: Tensor) -> Tensor:
    """‖·‖∞ of every row of ``(B, n)``."""
    return vectors.abs().amax(-1)
