"""One saddle-point system by its eigenvectors: what to answer where the matrix is singular, or may be.

The matrix is scaled (rows of C of norm 1, P of the size of 1) to decide which eigenvalues are zero, but least
norm is meant in the multipliers as they are: K⁺ = Π D (D K D)⁺ D Π, with D the scaling and Π the orthogonal
projection onto the range of K.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.linear.saddle_point.reduced import ReducedSystem

__all__ = ["SpectralSolution", "spectral_sample", "spectral_solution"]

_RANK = 1e-11  # eigenvalues under this share of the largest count as zero
_CONSISTENT = 1e-7  # a share of the right-hand side that may stand outside the range


@final
class SpectralSolution(NamedTuple):
    """The minimum-norm solution of one saddle-point system, ``(V, n + k)``, and what the matrix is like."""

    w: Tensor
    singular: bool
    loose: bool
    unsolvable: bool


def spectral_solution(
    hessian: Tensor, rows: Tensor, scales: Tensor, linear: Tensor, limits: Tensor
) -> SpectralSolution:
    """The minimum-norm solution of ``[P, Cᵀ; C, 0] w = (linear, limits)``, C = diag(scales) rows.

    Parameters
    ----------
    hessian : Tensor of shape ``(n, n)``
    rows : Tensor of shape ``(k, n)``
        Of norm 1, or less.
    scales : Tensor of shape ``(k,)``
    linear, limits : Tensor of shape ``(V, n)`` and ``(V, k)``
    """
    n, k = hessian.shape[0], rows.shape[0]
    if not n + k:
        return SpectralSolution(torch.cat([linear, limits], -1), False, False, False)
    size = hessian.abs().amax() if n else scales.new_ones(())
    size = torch.where(size > 0, size, torch.ones_like(size))
    matrix = hessian.new_zeros(n + k, n + k)
    matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = hessian / size, rows.mT, rows
    values, vectors = torch.linalg.eigh(matrix)
    zero = values.abs() <= _RANK * values.abs().amax()
    free = _null_multipliers(vectors[n:, zero], scales)
    right = torch.cat([linear / size, (limits - _onto(free, limits)) / scales], -1)
    inverse = torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, values))
    w = _times_inverse(vectors, inverse, right)
    w = w + _times_inverse(vectors, inverse, right - w @ matrix)
    singular = bool(zero.any())
    given = torch.cat([linear / size, limits / scales], -1)
    outside = (given - w @ matrix).abs().amax(-1) > _CONSISTENT * given.abs().amax(-1)
    loose = singular and bool((vectors[:n, zero] ** 2).sum() > 1e-6)
    multipliers = w[:, n:] * size / scales
    multipliers = multipliers - _onto(free, multipliers)
    whole = torch.cat([w[:, :n], multipliers], -1)
    return SpectralSolution(whole, singular, loose, singular and bool(outside.any()))


def _times_inverse(vectors: Tensor, inverse: Tensor, right: Tensor) -> Tensor:
    return ((right @ vectors) * inverse) @ vectors.mT


def _null_multipliers(scaled: Tensor, scales: Tensor) -> Tensor:
    """An orthonormal basis of the multipliers that pull nowhere, from those of the scaled rows."""
    if not scaled.numel():
        return scaled
    basis, cosines, _ = torch.linalg.svd(scaled, full_matrices=False)
    # The null space is that of x beside that of the multipliers: every cosine is 0 or 1.
    return torch.linalg.qr(basis[:, cosines > 0.5] / scales.unsqueeze(-1)).Q


def _onto(basis: Tensor, vectors: Tensor) -> Tensor:
    return (vectors @ basis) @ basis.mT


def spectral_sample(system: ReducedSystem, rhs: Tensor, index: int) -> SpectralSolution:
    """One sample of a batch, ``(V, B, N)``, over its free variables and active rows; w is ``(V, N)``."""
    n, rows = system.n, system.rows
    hessian = system.hessian[index % system.hessian.shape[0]]
    kept = system.active[index, :rows]
    matrix = system.matrix[index % system.matrix.shape[0]][kept]
    scales = system.scales[index % system.scales.shape[0]][kept]
    free = slice(None) if system.free is None else system.free[index] > 0
    linear, limits = rhs[:, index, :n], rhs[:, index, n : n + rows][:, kept]
    fixed = system.fixed_values(rhs[..., n + rows :])
    if fixed is not None:
        linear = linear - fixed[:, index] @ hessian
        limits = limits - (fixed[:, index] @ matrix.mT) * scales
    part, lines = hessian[free][:, free], matrix[:, free]
    found = spectral_solution(part, lines, scales, linear[:, free], limits)
    x = torch.zeros_like(linear)
    x[:, free] = found.w[:, : part.shape[0]]
    multipliers = rhs.new_zeros(rhs.shape[0], rows)
    multipliers[:, kept] = found.w[:, part.shape[0] :] * scales
    if fixed is not None:
        x = x + fixed[:, index]
    return found._replace(w=_assembled(system, rhs, index, x, multipliers))


def _assembled(system: ReducedSystem, rhs: Tensor, index: int, x: Tensor, multipliers: Tensor) -> Tensor:
    """(x, μ) of one sample in the order of z; multipliers of rows of norm 1 come in."""
    parts = [x, multipliers / system.scales[index % len(system.scales)]]
    if system.free is not None:
        assert system.lower is not None
        assert system.upper is not None
        hessian = system.hessian[index % system.hessian.shape[0]]
        matrix = system.matrix[index % system.matrix.shape[0]]
        left = rhs[:, index, : system.n] - x @ hessian - multipliers @ matrix
        if system.has_lower:
            parts.append(-left * system.lower[index])
        if rhs.shape[-1] - system.n - system.rows > system.n or not system.has_lower:
            parts.append(left * system.upper[index])
    return torch.cat(parts, -1)
