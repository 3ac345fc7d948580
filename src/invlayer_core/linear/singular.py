"""Is J singular *within the accuracy of y**, and what to answer if it is.

A solver stops near a singular root, not on it, so there J is merely ill-conditioned, and LU returns a
large and meaningless number. What tells a singular point from an ill-conditioned regular one is how J
changes over the distance by which y* may be off (the quantity h of the Newton–Kantorovich theorem,
Ortega & Rheinboldt 1970, 12.6): with a step δ of that size,

    h = ‖J(y)⁻¹ (J(y + δ) − J(y))‖,

a regular, converged point has h ≈ 0, while at a double root δ = y/2 makes h = ½ however close y is.
h is free of the scale of the equations, and its price, one more Jacobian, is only paid for samples
whose solution of the linear system is suspiciously large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

__all__ = [
    "Diagnosis",
    "balance",
    "balanced_solution",
    "damped_solution",
    "diagnose",
    "is_suspicious",
    "minimum_norm_solution",
    "suspicious_growth",
]

# Solutions this much larger than their right-hand side are looked at more closely (float64).
_SUSPICIOUS_GROWTH = 1e5
# Newton-Kantorovich: h <= 1/2 guarantees a regular root; one tenth keeps a distance.
_SINGULAR_CHANGE = 0.1


@final
class Diagnosis(NamedTuple):
    """What was found about every sample; each field has shape ``(B,)``."""

    singular: Tensor
    condition: Tensor
    change: Tensor  # h: by how much of itself J changes within the accuracy of y*
    residual: Tensor  # ‖F(y*)‖∞
    cutoff: Tensor  # singular values of J up to this one cannot be told from zero


def suspicious_growth(dtype: torch.dtype) -> float:
    """How many times its right-hand side a solution may be before J is examined."""
    return float(min(_SUSPICIOUS_GROWTH, 1e-2 / torch.finfo(dtype).eps))


def is_suspicious(solution: Tensor, rhs: Tensor) -> Tensor:
    """Samples ``(B,)`` whose solution is not finite, or very large beside its right-hand side."""
    limit = suspicious_growth(rhs.dtype)
    # "not (a <= b)" instead of "a > b": it also catches NaN.
    return ~(solution.abs().amax(-1) <= limit * rhs.abs().amax(-1))


def _svd(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD that survives NaN and infinity (their blocks are replaced by zero: singular)."""
    finite = blocks.isfinite().all(-1).all(-1)[..., None, None]
    return torch.linalg.svd(torch.where(finite, blocks, torch.zeros_like(blocks)), full_matrices=False)


def balance(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two for rows ``(B, n, 1)`` and columns ``(B, 1, n)``, after which the largest are about 1.

    Equations and unknowns come in units of their own, as multipliers do beside what is minimised. Without
    them a small singular value means what it should (Ruiz 2001).
    """
    size = torch.nan_to_num(blocks.abs())
    rows, columns = torch.ones_like(size[..., :1]), torch.ones_like(size[..., :1, :])
    for _ in range(3):
        scaled = rows * size * columns
        rows = rows * _power_of_two(scaled.amax(-1, keepdim=True))
        columns = columns * _power_of_two(scaled.amax(-2, keepdim=True))
    return rows, columns


def _power_of_two(size: Tensor) -> Tensor:
    """2ᵏ near 1/√size; 1 where size is 0 or infinite."""
    usable = (size > 0) & size.isfinite()
    exponent = torch.where(usable, size, torch.ones_like(size)).log2().div(-2).round()
    return torch.exp2(exponent)


def _inverse_times(svd: tuple[Tensor, Tensor, Tensor], change: Tensor) -> Tensor:
    """‖J⁻¹ change‖, in the Frobenius norm."""
    u, s, vh = svd
    return torch.linalg.matrix_norm(vh.mT @ ((u.mT @ change) / s.unsqueeze(-1)), ord="fro")


def diagnose(
    blocks: Tensor,
    y: Tensor,
    residual: Tensor,
    noise: Tensor,
    jacobian_at: Callable[[Tensor], Tensor],
    *,
    aligned: bool = True,
) -> Diagnosis:
    """Examine square blocks ``(B, n, n)`` at ``y`` ``(B, n)``.

    Parameters
    ----------
    blocks, y : Tensor
    residual : Tensor of shape ``(B, n)``
        F(y): how far the solver stopped from the root.
    noise : Tensor of shape ``(B, n)``
        The rounding error of evaluating F there.
    aligned : bool
        Whether the errors of the equations are independent, so that they may come together in the worst way.
        Those of Jᵀr are Jᵀ times the errors of r, and do not.
    jacobian_at : callable
        ``(B, n) -> (B, n, n)``.
    """
    rows, columns = balance(blocks)
    svd = _svd(rows * blocks * columns)
    u, s, vh = svd
    n = blocks.shape[-1]
    exact = s[..., -1] <= n * torch.finfo(blocks.dtype).eps * s[..., 0]

    def step(values: Tensor) -> Tensor:
        balanced = vh.mT @ ((u.mT @ (rows * values.unsqueeze(-1))) / s.unsqueeze(-1))
        return (columns.mT * balanced).squeeze(-1)

    if aligned:
        noise = noise.abs() * torch.where(u[..., -1] < 0, -1.0, 1.0).to(noise)
    worst_noise = step(noise)
    change = torch.zeros_like(s[..., 0])
    for delta in (-2.0 * step(residual), worst_noise, -worst_noise):
        moved = jacobian_at(y + torch.nan_to_num(delta, nan=0.0, posinf=0.0, neginf=0.0))
        ratio = _inverse_times(svd, rows * (moved - blocks) * columns)
        change = torch.maximum(change, torch.nan_to_num(ratio, nan=torch.inf))
    eps, plain = torch.finfo(blocks.dtype).eps, _svd(blocks)[1]
    largest, smallest = plain[..., 0], plain[..., -1]
    return Diagnosis(
        singular=exact | (change >= _SINGULAR_CHANGE) | ~blocks.isfinite().all(-1).all(-1),
        condition=torch.nan_to_num(largest / smallest, nan=torch.inf),
        change=change,
        residual=residual.abs().amax(-1),
        cutoff=torch.maximum(100.0 * smallest, eps**0.5 * largest),
    )


def minimum_norm_solution(blocks: Tensor, rhs: Tensor, cutoff: Tensor, *, transpose: bool) -> Tensor:
    """Least-squares solution of least norm, with singular values up to ``cutoff`` taken as zero.

    Differentiable as long as the rank stays what it is (Golub & Pereyra 1973).
    """
    matrix = blocks.mT if transpose else blocks
    pseudo_inverse = torch.linalg.pinv(matrix, atol=cutoff, rtol=torch.zeros_like(cutoff))
    return (pseudo_inverse @ rhs.unsqueeze(-1)).squeeze(-1)


def balanced_solution(blocks: Tensor, rhs: Tensor, *, transpose: bool) -> Tensor:
    """A solution of a singular system that has one: of least norm in the units of the balanced matrix.

    A singular value counts as zero beside the largest one, which says something only where equations and
    unknowns are of like size.
    """
    matrix = blocks.mT if transpose else blocks
    rows, columns = balance(matrix.detach())
    rank = torch.finfo(blocks.dtype).eps ** 0.75
    balanced, scaled = rows * matrix * columns, rows * rhs.unsqueeze(-1)
    inverse = torch.linalg.pinv(balanced, rtol=rank)
    solution = inverse @ scaled
    solution = solution + inverse @ (scaled - balanced @ solution)  # a pseudo-inverse is only so accurate
    return columns.squeeze(-2) * solution.squeeze(-1)


def damped_solution(blocks: Tensor, rhs: Tensor, damping: float, *, transpose: bool) -> Tensor:
    """Tikhonov: the minimiser of ‖A x − rhs‖² + damping² ‖x‖², with A the (transposed) block."""
    matrix = blocks.mT if transpose else blocks
    n = matrix.shape[-1]
    ridge = damping**2 * torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    gram = matrix.mT @ matrix + ridge
    lower, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(matrix.mT @ rhs.unsqueeze(-1), lower).squeeze(-1)
