"""The matrix of one program's active constraints, with its factors: solves that hold, or none."""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

import numpy as np
import torch
from torch import Tensor

from invlayer_core.linear.saddle_point.entries import Entries, stacked
from invlayer_core.linear.saddle_point.sparse_factors import SparseFactors
from invlayer_core.linear.saddle_point.sparse_system import SparseSystem
from invlayer_core.quadratic.single.program import HostProgram
from invlayer_core.solvers.registry import get_registry

__all__ = ["Factors", "factorise"]

_SMALL = 40  # variables up to which the matrix is solved with as it stands
_GROWTH = 1e7


class Factors(Protocol):
    """A factorised matrix."""

    def solve(self, rhs: np.ndarray) -> np.ndarray | None:
        """w for one ``(n + m,)``, zero for inactive constraints; None if it is not beyond doubt."""
        ...


def factorise(program: HostProgram, active: np.ndarray) -> Factors | None:
    """For a set of active constraints; None where the matrix may be singular."""
    if isinstance(program.P, Entries) or any(isinstance(block, Entries) for block in program.blocks):
        return _Sparse(program, active)
    return _Dense.of(program, active)


@final
class _Sparse:
    def __init__(self, program: HostProgram, active: np.ndarray) -> None:
        layout, n = program.layout, program.layout.size
        system = SparseSystem(
            _as_entries(program.P),
            stacked([_as_entries(block) for block in program.blocks], n),
            active,
            layout.equalities,
            "lb" in layout.names,
            "ub" in layout.names,
        )
        direct = get_registry().get_linear_solver("scipy.splu", "qp with sparse matrices")
        self.factors = SparseFactors(system, direct)

    def solve(self, rhs: np.ndarray) -> np.ndarray | None:
        w, _ = self.factors.solve(rhs)
        return w if self.factors.regular else None


def _as_entries(matrix: np.ndarray | Entries) -> Entries:
    if isinstance(matrix, Entries):
        return matrix
    row, column = matrix.nonzero()
    return Entries(matrix.shape, row, column, matrix[row, column])


@final
class _Dense(NamedTuple):
    """Variables at a bound taken out; of the rest the matrix as it stands, or P = L Lᵀ and a complement."""

    program: HostProgram
    kept: np.ndarray
    rows: np.ndarray
    lower: np.ndarray | None
    upper: np.ndarray | None
    core: _Whole | _Schur

    @classmethod
    def of(cls, program: HostProgram, active: np.ndarray) -> _Dense | None:
        P, n = program.P, program.layout.size
        assert isinstance(P, np.ndarray)
        count = program.layout.rows
        kept = active[:count].nonzero()[0]
        rows = _chosen(program, kept)
        lower = upper = None
        free, part = rows, P
        if active[count:].any():
            lower = active[count : count + n] if "lb" in program.given else np.zeros(n, dtype=bool)
            upper = active[-n:] & ~lower if "ub" in program.given else np.zeros(n, dtype=bool)
            index = (~(lower | upper)).nonzero()[0]
            free, part = rows[:, index], P[np.ix_(index, index)]
        if len(part) <= _SMALL:
            return cls(program, kept, rows, lower, upper, _Whole.of(part, free))
        core = _Schur.of(torch.from_numpy(part), program.lower if part is P else None, torch.from_numpy(free))
        return None if core is None else cls(program, kept, rows, lower, upper, core)

    def solve(self, rhs: np.ndarray) -> np.ndarray | None:
        n, count = self.program.layout.size, self.program.layout.rows
        linear, limits = rhs[:n], rhs[n : n + count][self.kept]
        w = np.zeros(len(rhs))
        if self.lower is None or self.upper is None:
            found = self.core.solve(linear, limits)
            if found is None:
                return None
            w[:n], w[n + self.kept] = found
            return w
        P, bounds = self.program.P, rhs[n + count :]
        x = np.zeros(n)
        if "lb" in self.program.given:
            x[self.lower] = -bounds[:n][self.lower]
        if "ub" in self.program.given:
            x[self.upper] = bounds[-n:][self.upper]
        free = ~(self.lower | self.upper)
        found = self.core.solve((linear - P @ x)[free], limits - self.rows @ x)
        if found is None:
            return None
        x[free], multipliers = found
        left = linear - P @ x - multipliers @ self.rows
        w[:n], w[n + self.kept] = x, multipliers
        if "lb" in self.program.given:
            w[n + count : n + count + n] = np.where(self.lower, -left, 0.0)
        if "ub" in self.program.given:
            w[-n:] = np.where(self.upper, left, 0.0)
        return w


def _chosen(program: HostProgram, kept: np.ndarray) -> np.ndarray:
    """The active rows of A and G, ``(k, n)``; those of A all are."""
    if not program.blocks:
        return np.zeros((0, program.layout.size))
    if len(program.blocks) == 1:
        chosen: np.ndarray = program.blocks[0][kept]
        return chosen
    A, G = program.blocks
    return np.concatenate([A, G[kept[len(A) :] - len(A)]])


@final
class _Whole(NamedTuple):
    """The whole matrix of a small program, solved with as it stands."""

    matrix: np.ndarray
    n: int

    @classmethod
    def of(cls, P: np.ndarray, rows: np.ndarray) -> _Whole:
        n = len(P)
        matrix = np.zeros((n + len(rows), n + len(rows)))
        matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = P, rows.T, rows
        return cls(matrix, n)

    def solve(self, linear: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """x and the multipliers of the active rows; None if they do not hold, or nearly not."""
        rhs = np.concatenate([linear, limits])
        if not len(rhs):
            return rhs, rhs
        try:
            w = np.linalg.solve(self.matrix, rhs)
        except np.linalg.LinAlgError:
            return None
        size, largest = np.abs(rhs).max(), np.abs(w).max()
        left = np.abs(self.matrix @ w - rhs).max()
        if not (left <= 1e-12 * (size + largest) and largest <= _GROWTH * size):
            return None
        return w[: self.n], w[self.n :]


@final
class _Schur(NamedTuple):
    """P = L Lᵀ and the Schur complement of the active rows, as in ``linear/saddle_point/dense.py``."""

    P: Tensor
    lower: Tensor
    rows: Tensor
    half: Tensor
    schur: Tensor

    @classmethod
    def of(cls, P: Tensor, lower: Tensor | None, rows: Tensor) -> _Schur | None:
        """The factors; None where they may be singular."""
        if lower is None:
            lower, info = torch.linalg.cholesky_ex(P)
            if int(info):
                return None
        half = torch.linalg.solve_triangular(lower, rows.mT, upper=False)
        schur, info = torch.linalg.cholesky_ex(half.mT @ half)
        if int(info) or _may_be_singular(lower) or _may_be_singular(schur):
            return None
        return cls(P, lower, rows, half, schur)

    def solve(self, linear: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """x and the multipliers of the active rows; None if they do not hold."""
        r, s = torch.from_numpy(linear).unsqueeze(-1), torch.from_numpy(limits).unsqueeze(-1)
        x, mu = self._once(r, s)
        for _ in range(2):
            left, gap = r - self.P @ x - self.rows.mT @ mu, s - self.rows @ x
            error = max(_share(left, r, x), _share(gap, s, torch.cat([x, r / self.P.diagonal().max()])))
            if error <= 1e-13:
                break
            step = self._once(left, gap)
            x, mu = x + step[0], mu + step[1]
        return (x.numpy()[:, 0], mu.numpy()[:, 0]) if error <= 1e-10 else None

    def _once(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.linalg.solve_triangular(self.lower, r, upper=False)
        if not len(s):
            return torch.linalg.solve_triangular(self.lower.mT, t, upper=True), s
        mu = torch.cholesky_solve(self.half.mT @ t - s, self.schur)
        return torch.linalg.solve_triangular(self.lower.mT, t - self.half @ mu, upper=True), mu


def _may_be_singular(factor: Tensor) -> bool:
    pivots = factor.diagonal().numpy()
    return bool(len(pivots)) and not pivots.min() ** 2 > 1e-13 * pivots.max() ** 2


def _share(left: Tensor, right: Tensor, x: Tensor) -> float:
    """What is left, beside the right-hand side and the solution; 0 if there is nothing."""
    if not len(left):
        return 0.0
    whole = float(right.abs().max() + x.abs().max())
    return float(left.abs().max()) / whole if whole else 0.0
