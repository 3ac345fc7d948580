"""The matrix of one program's active constraints, with its factors: solves that hold, or none."""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

import numpy as np

from invlayer_core.linear.saddle_point.entries import Entries, stacked
from invlayer_core.linear.saddle_point.sparse_factors import SparseFactors
from invlayer_core.linear.saddle_point.sparse_system import SparseSystem
from invlayer_core.quadratic.single.cores import Inverse, Schur
from invlayer_core.quadratic.single.program import HostProgram
from invlayer_core.solvers.registry import get_registry

__all__ = ["Factors", "factorise"]

_SMALL = 40  # variables up to which the matrix is inverted as it stands


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
    """Variables at a bound taken out, and the factors of the rest.

    Attributes
    ----------
    program : HostProgram
    kept, rows : ndarray
        The numbers of the active rows of A and G, and these rows.
    lower, upper : ndarray of bool, or None
        Which variables stand at a bound, if any does.
    free : ndarray, or slice
        The others.
    core : Inverse or Schur
    """

    program: HostProgram
    kept: np.ndarray
    rows: np.ndarray
    lower: np.ndarray | None
    upper: np.ndarray | None
    free: np.ndarray | slice
    core: Inverse | Schur

    @classmethod
    def of(cls, program: HostProgram, active: np.ndarray) -> _Dense | None:
        """The factors; None where the matrix may be singular."""
        P, n, count = program.P, program.layout.size, program.layout.rows
        kept = active[:count].nonzero()[0]
        rows = part = _chosen(program, kept)
        lower = upper = None
        free: np.ndarray | slice = slice(None)
        factor = program.lower
        if active[count:].any():
            lower = active[count : count + n] if "lb" in program.given else np.zeros(n, dtype=bool)
            upper = active[-n:] & ~lower if "ub" in program.given else np.zeros(n, dtype=bool)
            free = index = (~(lower | upper)).nonzero()[0]
            P, part, factor = P[np.ix_(index, index)], rows[:, index], None
        small = len(P) <= _SMALL
        core = Inverse.of(P, part, program.scales[kept]) if small else Schur.of(P, part, factor)
        return None if core is None else cls(program, kept, rows, lower, upper, free, core)

    def solve(self, rhs: np.ndarray) -> np.ndarray | None:
        n, count, given = self.program.layout.size, self.program.layout.rows, self.program.given
        linear, limits = rhs[:n], rhs[n : n + count][self.kept]
        w = np.zeros(len(rhs))
        if self.lower is None or self.upper is None:
            found = self.core.solve(linear, limits)
            if found is None:
                return None
            w[:n], w[n + self.kept] = found
            return w
        P, bounds, x = self.program.P, rhs[n + count :], w[:n]
        if "lb" in given:
            x[self.lower] = -bounds[:n][self.lower]
        if "ub" in given:
            x[self.upper] = bounds[-n:][self.upper]
        found = self.core.solve((linear - P @ x)[self.free], limits - self.rows @ x)
        if found is None:
            return None
        x[self.free], multipliers = found
        w[n + self.kept] = multipliers
        left = linear - P @ x - multipliers @ self.rows
        if "lb" in given:
            w[n + count : n + count + n] = np.where(self.lower, -left, 0.0)
        if "ub" in given:
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
