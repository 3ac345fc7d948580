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

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram, program_of_sample
from invlayer_core.linear.saddle_point.solution import SaddleSolution
from invlayer_core.linear.saddle_point.sparse_system import SparseSystem
from invlayer_core.solvers.direct import Factor, SparseDirectSolver

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SparseSaddlePoint"]

_ACCEPTED = 1e-10  # backward error, relative
_REFINED = 1e-13
_GROWTH = 1e7  # times its right-hand side a solution may be before the matrix is taken for singular
_CONSISTENT = 1e-7  # a share of the right-hand side that may be left where the matrix is singular
_DELTA = 1e-6  # rounding leaves a share of about eps/δ in the null space
_STEPS = 60


@final
class SparseSaddlePoint:
    """The factors for one batch of programs and active constraints.

    Parameters
    ----------
    program, active, exempt : see :class:`~invlayer_core.linear.saddle_point.dense.DenseSaddlePoint`
    direct : SparseDirectSolver
    """

    def __init__(
        self, program: QuadraticProgram, active: Tensor, exempt: Tensor | None, direct: SparseDirectSolver
    ) -> None:
        batch = active.shape[:-1]
        self.device = active.device
        host = active.reshape(batch.numel(), active.shape[-1]).cpu()
        skipped = [False] * len(host) if exempt is None else exempt.reshape(-1).tolist()
        self.systems = [
            None if skip else _Factorised(SparseSystem(program_of_sample(program, batch, i), host[i]), direct)
            for i, skip in enumerate(skipped)
        ]

    def solve(self, rhs: Tensor) -> SaddleSolution:
        """w for right-hand sides ``(V, B, n + m)``."""
        host = rhs.to("cpu", torch.float64)
        w = torch.zeros_like(host)
        singular, unsolvable = (torch.zeros(rhs.shape[1], dtype=torch.bool) for _ in range(2))
        for index, system in enumerate(self.systems):
            if system is not None:
                w[:, index], singular[index], unsolvable[index] = system.solve(host[:, index])
        verdicts = (mask.to(self.device) for mask in (singular, torch.zeros_like(singular), unsolvable))
        return SaddleSolution(w.to(rhs), *verdicts)


@final
class _Factorised:
    """One sample, and the factors of its matrix, or of the matrix shifted."""

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

    def solve(self, rhs: Tensor) -> tuple[Tensor, bool, bool]:
        """w for ``(V, n + m)``; whether the matrix is singular, and whether w is no solution."""
        reduced, fixed = self.system.reduced(rhs)
        w, singular, unsolvable = self._solve_reduced(reduced)
        return self.system.whole(rhs, w, fixed), singular, unsolvable

    def _solve_reduced(self, rhs: Tensor) -> tuple[Tensor, bool, bool]:
        if not self.system.order:
            return rhs, False, False
        w = None
        if self.regular and self.factor is not None:
            w, error = self._refined(self.factor, rhs, 3)
            if error <= _ACCEPTED and _grows_little(w, rhs):
                return w, False, False
        shifted = self._factorise(_DELTA) if self.regular else self.factor  # once singular, always so
        if shifted is None:
            return torch.full_like(rhs, torch.nan), True, True
        least, its_error = self._refined(shifted, rhs, _STEPS)
        if w is not None and error <= _ACCEPTED and not its_error <= _ACCEPTED:
            return w, False, False  # regular, only ill-conditioned
        self.factor, self.regular = shifted, False
        left = (rhs - self.system.times(least)).abs().amax()
        return least, True, not bool(left <= _CONSISTENT * rhs.abs().amax())

    def _refined(self, factor: Factor, rhs: Tensor, steps: int) -> tuple[Tensor, float]:
        w, gap, error = torch.zeros_like(rhs), rhs, float("inf")
        for _ in range(steps):
            trial = w + torch.stack([torch.from_numpy(_solved(factor, row)) for row in gap])
            its_gap = rhs - self.system.times(trial)
            size = rhs.abs().amax() + trial.abs().amax()
            its_error = float(its_gap.abs().amax() / size) if size > 0 else 0.0
            if not its_error < error:  # also for NaN
                break
            w, gap, error = trial, its_gap, its_error
            if error <= _REFINED:
                break
        return w, error


def _solved(factor: Factor, rhs: Tensor) -> np.ndarray:
    return factor.solve(rhs.contiguous().numpy())


def _grows_little(w: Tensor, rhs: Tensor) -> bool:
    return bool(w.abs().amax() <= _GROWTH * rhs.abs().amax())
