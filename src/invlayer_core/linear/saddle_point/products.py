"""Products and triangular solves, with matrices that a batch shares or has one each."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky_solve", "largest", "may_be_singular", "share", "times"]

_PIVOTS = 1e-13  # ratio of squared pivots under which a factor may be that of a singular matrix


def may_be_singular(factor: Tensor) -> Tensor:
    """Whether the pivots of a Cholesky factor ``(*batch, n, n)`` say so, ``(*batch,)``."""
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    if not pivots.shape[-1]:
        return torch.zeros(pivots.shape[:-1], dtype=torch.bool, device=pivots.device)
    return ~(pivots.amin(-1) > _PIVOTS * pivots.amax(-1))  # True for NaN


def cholesky_solve(factor: Tensor, rhs: Tensor) -> Tensor:
    """Solve with ``(1 or B, n, n)`` for ``(V, B, n)``."""
    if not rhs.shape[-1]:
        return rhs
    if factor.shape[0] == 1:
        flat = rhs.reshape(-1, rhs.shape[-1]).mT
        return torch.cholesky_solve(flat, factor[0]).mT.reshape(rhs.shape)
    return torch.cholesky_solve(rhs.permute(1, 2, 0), factor).permute(2, 0, 1)


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``(1 or B, m, n)`` times ``(V, B, n)``."""
    if matrix.shape[0] == 1:
        return vectors @ matrix[0].mT
    return (matrix @ vectors.permute(1, 2, 0)).permute(2, 0, 1)


def largest(vectors: Tensor) -> Tensor:
    """‖·‖∞ along the last dim, 0 where that is empty."""
    return vectors.abs().amax(-1) if vectors.shape[-1] else vectors.new_zeros(vectors.shape[:-1])


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where both are 0."""
    return part / torch.where(whole > 0, whole, torch.ones_like(whole))
