"""The two ways to solve with a dense saddle-point matrix: by its inverse, or by a Schur complement."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Inverse", "Schur", "largest"]

_ACCEPTED = 1e-10  # backward error, relative
_REFINED = 1e-13  # ... from which a step of refinement is worth its price
_PIVOTS = 1e-13  # ratio of squared pivots under which a factor may be that of a singular matrix
_CONDITION = 1e10  # ... and that of the matrix itself

Pair = tuple[np.ndarray, np.ndarray]


@final
class Inverse(NamedTuple):
    """``diag(scales) [P, Cᵀ; C, 0] diag(scales)``, its rows of about the same size, and its inverse."""

    n: int
    matrix: np.ndarray
    scales: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, P: np.ndarray, rows: np.ndarray, norms: np.ndarray) -> Inverse | None:
        """None where the matrix may be singular, by its condition number."""
        n, order = len(P), len(P) + len(rows)
        matrix = np.zeros((order, order))
        matrix[:n, :n], matrix[n:, :n], matrix[:n, n:] = P, rows, rows.T
        scales = np.empty(order)
        scales[:n] = unit = (largest(P.ravel()) or 1.0) ** -0.5
        scales[n:] = 1.0 / (norms * unit)
        matrix *= scales
        matrix *= scales[:, None]
        try:
            inverse = np.linalg.inv(matrix)
        except np.linalg.LinAlgError:
            return None
        condition = largest(matrix.ravel()) * largest(inverse.ravel())
        return cls(n, matrix, scales, inverse) if condition <= _CONDITION else None

    def solve(self, linear: np.ndarray, limits: np.ndarray) -> Pair | None:
        """x and the multipliers of the active rows; None if they do not hold."""
        rhs = np.concatenate([linear, limits]) * self.scales
        w, error = self.inverse @ rhs, np.inf
        for _ in range(3):
            left = rhs - self.matrix @ w
            error = _share(largest(left), largest(rhs) + largest(w))
            if not error > _REFINED:
                break
            w = w + self.inverse @ left
        w *= self.scales
        return (w[: self.n], w[self.n :]) if error <= _ACCEPTED else None


@final
class Schur(NamedTuple):
    """P = L Lᵀ and the Schur complement of the active rows, as in ``linear/saddle_point/dense.py``."""

    P: np.ndarray
    rows: np.ndarray
    lower: Tensor
    half: np.ndarray
    complement: Tensor

    @classmethod
    def of(cls, P: np.ndarray, rows: np.ndarray, lower: np.ndarray | None) -> Schur | None:
        """The factors, ``lower`` that of P if it is known; None where they may be singular."""
        try:
            factor = torch.from_numpy(np.linalg.cholesky(P) if lower is None else lower)
            half = torch.linalg.solve_triangular(factor, torch.from_numpy(rows).mT, upper=False).numpy()
            complement = torch.from_numpy(np.linalg.cholesky(half.T @ half))
        except np.linalg.LinAlgError:
            return None
        if _may_be_singular(factor) or _may_be_singular(complement):
            return None
        return cls(P, rows, factor, half, complement)

    def solve(self, linear: np.ndarray, limits: np.ndarray) -> Pair | None:
        """x and the multipliers of the active rows; None if they do not hold."""
        x, mu = self._once(linear, limits)
        free = largest(linear) / self.P.diagonal().max()  # of the order of x without constraints
        error = np.inf
        for _ in range(3):
            left, gap = linear - self.P @ x - mu @ self.rows, limits - self.rows @ x
            size = largest(x)
            error = max(
                _share(largest(left), largest(linear) + size),
                _share(largest(gap), largest(limits) + max(size, free)),
            )
            if not error > _REFINED:
                break
            step = self._once(left, gap)
            x, mu = x + step[0], mu + step[1]
        return (x, mu) if error <= _ACCEPTED else None

    def _once(self, linear: np.ndarray, limits: np.ndarray) -> Pair:
        pulled = _triangular(self.lower, linear, upper=False)
        if not len(limits):
            return _triangular(self.lower.mT, pulled, upper=True), limits
        right = torch.from_numpy((pulled @ self.half - limits)[:, None])
        mu: np.ndarray = torch.cholesky_solve(right, self.complement).numpy()[:, 0]
        return _triangular(self.lower.mT, pulled - self.half @ mu, upper=True), mu


def _triangular(factor: Tensor, rhs: np.ndarray, *, upper: bool) -> np.ndarray:
    found = torch.linalg.solve_triangular(factor, torch.from_numpy(rhs[:, None]), upper=upper)
    solution: np.ndarray = found.numpy()[:, 0]
    return solution


def _may_be_singular(factor: Tensor) -> bool:
    pivots = factor.numpy().diagonal()
    return bool(len(pivots)) and not pivots.min() ** 2 > _PIVOTS * pivots.max() ** 2


def largest(values: np.ndarray) -> float:
    """‖·‖∞; 0 for nothing."""
    return float(np.maximum.reduce(np.abs(values))) if len(values) else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
