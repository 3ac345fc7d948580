"""Solve J x = b or Jᵀ x = b for a batch, with a decision for every sample whose J is singular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError, SingularJacobianError
from invlayer_core.linear.lu import has_lost_rank, lu_factor, lu_solve
from invlayer_core.linear.singular import (
    Diagnosis,
    balance,
    balanced_solution,
    damped_solution,
    is_suspicious,
    minimum_norm_solution,
)

__all__ = ["BlockSolution", "SingularPolicy", "SolveRequest", "solve_blocks"]

SingularPolicy = Literal["raise", "consistent", "lstsq", "damped", "nan", "zero"]

_CONSISTENT = 0.4  # a singular system holds if its residual is within eps^0.4 of its right-hand side


@final
@dataclass(frozen=True)
class SolveRequest:
    """One linear solve per sample.

    Attributes
    ----------
    blocks : Tensor of shape ``(B, m, n)``
    rhs : Tensor of shape ``(B, n)`` if ``transpose`` else ``(B, m)``
    transpose : bool
    singular : str
        What to answer for singular samples.
    damping : float
        For ``singular="damped"``.
    diagnose : callable
        Examines the blocks; called only when a solution looks suspicious.
    exempt : Tensor of shape ``(B,)`` or None
        Samples that have been decided already, and are not to be examined.
    least_norm : bool
        Answer every sample as ``singular="lstsq"`` answers singular ones.
    """

    blocks: Tensor
    rhs: Tensor
    transpose: bool
    singular: SingularPolicy
    damping: float
    diagnose: Callable[[], Diagnosis]
    exempt: Tensor | None = None
    least_norm: bool = False

    def turned(self, blocks: Tensor) -> Tensor:
        """What is solved with: J or Jᵀ itself. To the last bit it matters which of them is factorised."""
        return blocks.mT if self.transpose else blocks


@final
class BlockSolution(NamedTuple):
    """x, and which samples were answered by the policy for singular ones (None: none was)."""

    x: Tensor  # (B, n), or (B, m) if transposed
    singular: Tensor | None  # (B,)


def solve_blocks(request: SolveRequest) -> BlockSolution:
    """Solve for every sample; differentiable to any order.

    Raises
    ------
    SingularJacobianError
        If a sample's block is singular and the policy is ``"raise"``; or ``"consistent"``, and its system
        has no solution.
    ConditionsError
        If blocks are not square and the policy is not ``"lstsq"`` or ``"damped"``.
    """
    if request.least_norm or request.blocks.shape[-1] != request.blocks.shape[-2]:
        everything = torch.ones(request.blocks.shape[0], dtype=torch.bool, device=request.blocks.device)
        return BlockSolution(_solve_without_inverse(request), everything)
    matrix = request.turned(request.blocks)
    factors = lu_factor(matrix)
    solution = lu_solve(matrix, request.rhs, factors)
    with torch.no_grad():
        suspicious = is_suspicious(solution, request.rhs)
        if request.singular == "consistent":  # whose solutions need not be large
            suspicious = suspicious | has_lost_rank(factors)
        if request.exempt is not None:
            suspicious = suspicious & ~request.exempt
        # Over all mapped right-hand sides: what is examined is the block, which they share.
        suspicious = _functorch.plain(suspicious).reshape(-1, request.blocks.shape[0]).any(0)
        if not bool(suspicious.any()):
            return BlockSolution(solution, None)
        found = request.diagnose()
        # A sample whose cotangent is zero asks for nothing: its answer is zero, singular or not.
        unasked = (request.rhs == 0).all(-1)
        singular = found.singular & suspicious
    if not bool(_functorch.plain(singular).any()):
        return BlockSolution(solution, None)
    if request.singular == "raise" and bool(_functorch.plain(singular & ~unasked).any()):
        raise _singular_error(_functorch.plain(singular), found, request)
    answer = _answer_singular(request, found, singular, unasked)
    if request.singular == "consistent":
        without = _functorch.plain(singular & ~_holds(request, answer))
        if bool(without.any()):
            raise _singular_error(without, found, request)
    return BlockSolution(answer, singular)


@torch.no_grad()
def _holds(request: SolveRequest, x: Tensor) -> Tensor:
    """Samples ``(B,)`` whose linear system x solves, as a singular one may be solved: to rounding.

    The residual is that of the balanced system: in its own units, a row that is small beside the others would
    not count.
    """
    matrix = request.turned(request.blocks)
    rows, _ = balance(matrix)
    gap = rows.squeeze(-1) * ((matrix @ x.unsqueeze(-1)).squeeze(-1) - request.rhs)
    allowed = torch.finfo(x.dtype).eps ** _CONSISTENT * (rows.squeeze(-1) * request.rhs).abs().amax(-1)
    return gap.abs().amax(-1) <= allowed


def _lu(blocks: Tensor, request: SolveRequest) -> Tensor:
    matrix = request.turned(blocks)
    return lu_solve(matrix, request.rhs, lu_factor(matrix))


def _answer_singular(request: SolveRequest, found: Diagnosis, singular: Tensor, unasked: Tensor) -> Tensor:
    """LU for regular samples, the policy's answer for singular ones; neither sees the other's blocks.

    Replacing the other kind's blocks by the identity *before* solving keeps NaN out of derivatives: the
    derivative of ``where(mask, finite, nan)`` is NaN.
    """
    mask = singular.unsqueeze(-1)
    identity = torch.eye(request.blocks.shape[-1], dtype=request.blocks.dtype, device=request.blocks.device)
    regular_blocks = torch.where(mask.unsqueeze(-1), identity, request.blocks)
    regular = _lu(regular_blocks, request)
    singular_blocks = torch.where(mask.unsqueeze(-1), request.blocks, identity)
    answer = _policy_answer(request, singular_blocks, found)
    answer = torch.where(unasked.unsqueeze(-1), torch.zeros_like(answer), answer)
    return torch.where(mask, answer, regular)


def _policy_answer(request: SolveRequest, blocks: Tensor, found: Diagnosis) -> Tensor:
    rhs, transpose = request.rhs, request.transpose
    if request.singular == "lstsq":
        return minimum_norm_solution(blocks, rhs, found.cutoff, transpose=transpose)
    if request.singular == "consistent":
        return balanced_solution(blocks, rhs, transpose=transpose)
    if request.singular == "damped":
        return damped_solution(blocks, rhs, request.damping, transpose=transpose)
    return torch.full_like(rhs, torch.nan if request.singular == "nan" else 0.0)


def _solve_without_inverse(request: SolveRequest) -> Tensor:
    m, n = request.blocks.shape[-2:]
    if request.singular == "damped" and not request.least_norm:
        return damped_solution(request.blocks, request.rhs, request.damping, transpose=request.transpose)
    if request.singular == "lstsq" or request.least_norm:
        largest = torch.linalg.matrix_norm(request.blocks.detach(), ord=2)
        cutoff = largest * max(m, n) * torch.finfo(request.blocks.dtype).eps
        return minimum_norm_solution(request.blocks, request.rhs, cutoff, transpose=request.transpose)
    raise ConditionsError(
        f"the conditions give {m} equations for {n} unknowns, so their Jacobian has no inverse. Accepted are "
        "as many equations as unknowns; or, with adjoint=Implicit(singular='lstsq'), the derivative by the "
        "Moore-Penrose inverse J⁺: the smallest change of y that keeps the equations (more unknowns than "
        "equations), or the one that fits them best (fewer)."
    )


def _singular_error(singular: Tensor, found: Diagnosis, request: SolveRequest) -> SingularJacobianError:
    condition, change, residual = (
        _functorch.plain(field).reshape(-1) for field in (found.condition, found.change, found.residual)
    )
    # Over all mapped right-hand sides, too: what is named is the sample, which they share.
    bad = singular.reshape(-1, condition.numel()).any(0).nonzero().reshape(-1).tolist()
    shown = ", ".join(
        f"sample {i} (residual {float(residual[i]):.1e}, condition {float(condition[i]):.1e}, "
        f"{_how_singular(float(change[i]))})"
        for i in bad[:5]
    )
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return SingularJacobianError(
        f"the Jacobian of the conditions is singular at the solution of {shown}{more}, of "
        f"{condition.numel()} samples: y is not a differentiable function of the args there (a double "
        f"root, a fold, or redundant equations). {_nan_origin(request)}"
        "Accepted are regular samples; or choose what a singular one should give: "
        "adjoint=Implicit(singular='consistent' | 'lstsq' | 'damped' | 'nan' | 'zero')."
    )


def _how_singular(change: float) -> str:
    if change == float("inf"):
        return "not invertible to rounding"
    return f"J changes by {change:.0%} of itself within the accuracy of y"


def _nan_origin(request: SolveRequest) -> str:
    if not bool(_functorch.plain(request.rhs).isfinite().all()):
        return "The cotangent that came in already holds NaN or infinity. "
    if not bool(_functorch.plain(request.blocks).isfinite().all()):
        return "The Jacobian holds NaN or infinity. "
    return ""
