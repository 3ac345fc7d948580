"""Solves with the saddle-point matrix of the active constraints, sample by sample, by a sparse direct solver.

What fixes one variable alone (a bound, or a row with one entry) is taken out first. Of the rest,

    [ P   Cᵀ ]
    [ C   0  ]

is factorised as it stands. Where that is singular (rows that depend on each other, x not unique), K + δ
diag(I, −I) has the factors instead: it is quasi-definite, so that it always has some (Vanderbei, SIAM J.
Optim. 1995), and refinement with it converges to the solution of least norm: both matrices map the null space
of K, and its orthogonal complement, to themselves.
"""

from __future__ import annotations

from typing import final

import numpy as np

from invlayer_core.linear.saddle_point.sparse_system import SparseSystem
from invlayer_core.solvers.direct import Factor, SparseDirectSolver

__all__ = ["SparseFactors"]

_ACCEPTED = 1e-10  # backward error, relative
_REFINED = 1e-13
_GROWTH = 1e7  # times its right-hand side a solution may be before the matrix is taken for singular
_CONSISTENT = 1e-7  # a share of the right-hand side that may be left where the matrix is singular
_DELTA = 1e-6  # rounding leaves a share of about eps/δ in the null space
_STEPS = 60


@final
class SparseFactors:
    """One sample's matrix with its factors, or those of the matrix shifted.

    Attributes
    ----------
    regular : bool
        False as soon as a solve has shown that the matrix is singular.
    """

    def __init__(self, system: SparseSystem, direct: SparseDirectSolver) -> None:
        self.system, self.direct = system, direct
        self.factor, self.regular = self._factorise(0.0), True

    def _factorise(self, delta: float) -> Factor | None:
        if not self.system.order:
            return None
        try:
            return self.direct.factorise(self.system.compressed(delta), {})
        except ArithmeticError:
            return None

    def solve(self, rhs: np.ndarray) -> tuple[np.ndarray, bool]:
        """w for one ``(n + m,)``; and whether it is no solution."""
        reduced, fixed = self.system.reduced(rhs)
        w, unsolvable = self._solve_reduced(reduced)
        return self.system.whole(rhs, w, fixed), unsolvable

    def _solve_reduced(self, rhs: np.ndarray) -> tuple[np.ndarray, bool]:
        if not self.system.order:
            return rhs, False
        w, error = rhs, np.inf
        if self.regular and self.factor is not None:
            w, error = self._refined(self.factor, rhs, 3)
            if error <= _ACCEPTED and np.abs(w).max() <= _GROWTH * np.abs(rhs).max():
                return w, False
        shifted = self._factorise(_DELTA) if self.regular else self.factor  # once singular, always so
        if shifted is None:
            self.regular = False
            return np.full_like(rhs, np.nan), True
        least, its_error = self._refined(shifted, rhs, _STEPS)
        if error <= _ACCEPTED and not its_error <= _ACCEPTED:
            return w, False  # regular, only ill-conditioned
        self.factor, self.regular = shifted, False
        left = np.abs(rhs - self.system.entries @ least).max()
        return least, not bool(left <= _CONSISTENT * np.abs(rhs).max())

    def _refined(self, factor: Factor, rhs: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
        w, gap, error = np.zeros_like(rhs), rhs, float("inf")
        for _ in range(steps):
            trial = w + factor.solve(gap)
            its_gap = rhs - self.system.entries @ trial
            size = np.abs(rhs).max() + np.abs(trial).max()
            its_error = float(np.abs(its_gap).max() / size) if size > 0 else 0.0
            if not its_error < error:  # also for NaN
                break
            w, gap, error = trial, its_gap, its_error
            if error <= _REFINED:
                break
        return w, error
