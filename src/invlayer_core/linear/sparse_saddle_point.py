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

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram, program_of_sample
from invlayer_core.linear.saddle_point import SaddleSolution
from invlayer_core.matrices import MatrixForm, SparseForm
from invlayer_core.solvers.direct import Factor, SparseDirectSolver, SparseMatrix

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
    program, active, exempt : see :class:`~invlayer_core.linear.saddle_point.DenseSaddlePoint`
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
            None if skip else _System(program_of_sample(program, batch, i), host[i], direct)
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
@dataclass(frozen=True, eq=False)
class _Entries:
    """A sparse matrix by its entries."""

    row: Tensor
    column: Tensor
    value: Tensor


def _entries(form: MatrixForm, held: Tensor) -> _Entries:
    if isinstance(form, SparseForm):
        return _Entries(form.row.cpu(), form.column.cpu(), held.to("cpu", torch.float64))
    host = held.to("cpu", torch.float64)
    row, column = host.nonzero(as_tuple=True)
    return _Entries(row, column, host[row, column])


@final
class _System:
    """One sample: its variables that are free, its active rows, and the factors of their matrix."""

    def __init__(self, program: QuadraticProgram, active: Tensor, direct: SparseDirectSolver) -> None:
        layout = program.layout
        self.n, self.rows, self.direct = layout.size, layout.rows, direct
        self.has_lower, self.has_upper = "lb" in layout.names, "ub" in layout.names
        self.hessian = self._symmetric(program)
        self.matrix = self._all_rows(program)
        self._fix(active, layout.equalities)
        self._reduce()
        self.factor, self.regular = self._factorise(0.0), True

    def _symmetric(self, program: QuadraticProgram) -> _Entries:
        """½ (P + Pᵀ)."""
        if "P" not in program.tensors:
            nothing = torch.zeros(0, dtype=torch.int64)
            return _Entries(nothing, nothing, torch.zeros(0, dtype=torch.float64))
        P = _entries(program.layout.forms["P"], program.tensors["P"])
        if torch.equal(P.row, P.column):
            return P
        keys = torch.cat([P.row * self.n + P.column, P.column * self.n + P.row])
        places, slot = keys.unique(return_inverse=True)
        value = torch.zeros(len(places), dtype=torch.float64)
        value.index_add_(0, slot, 0.5 * torch.cat([P.value, P.value]))
        return _Entries(places // self.n, places % self.n, value)

    def _all_rows(self, program: QuadraticProgram) -> _Entries:
        """A above G."""
        parts, first = [], 0
        for name in ("A", "G"):
            if name in program.tensors:
                form = program.layout.forms[name]
                part = _entries(form, program.tensors[name])
                parts.append(_Entries(part.row + first, part.column, part.value))
                first += form.rows
        if len(parts) == 1:
            return parts[0]
        if not parts:
            nothing = torch.zeros(0, dtype=torch.int64)
            return _Entries(nothing, nothing, torch.zeros(0, dtype=torch.float64))
        return _Entries(*(torch.cat([getattr(p, f) for p in parts]) for f in ("row", "column", "value")))

    def _fix(self, active: Tensor, equalities: int) -> None:
        """The variables that stand at a bound, or that a row with one entry fixes."""
        bounds, nothing = active[self.rows :], torch.zeros(self.n, dtype=torch.bool)
        self.lower = bounds[: self.n] if self.has_lower else nothing
        self.upper = (bounds[-self.n :] & ~self.lower) if self.has_upper else nothing
        fixed = self.lower | self.upper
        rows = active[: self.rows].clone()
        row, column, value = self.matrix.row, self.matrix.column, self.matrix.value
        alone = (torch.bincount(row, minlength=self.rows) == 1) & rows
        alone[:equalities] = False
        single = (
            (alone.index_select(0, row) & ~fixed.index_select(0, column) & (value != 0)).nonzero().reshape(-1)
        )
        owner = torch.full((self.n,), -1).index_copy_(0, column[single], single)
        single = owner[owner >= 0]  # one for each variable; others stay rows
        self.single_row, self.single_column = row[single], column[single]
        self.single_value = value[single]
        fixed[self.single_column] = True
        rows[self.single_row] = False
        self.free, self.kept = ~fixed, rows

    def _reduce(self) -> None:
        """The matrix over free variables and kept rows, as entries in the order of its columns."""
        free, kept = self.free.nonzero().reshape(-1), self.kept.nonzero().reshape(-1)
        self.free_index, self.kept_index = free, kept
        number = torch.full((self.n,), -1).index_copy_(0, free, torch.arange(len(free)))
        line = torch.full((self.rows,), -1).index_copy_(0, kept, torch.arange(len(kept)))
        P, C = self.hessian, self.matrix
        pi, pj = number.index_select(0, P.row), number.index_select(0, P.column)
        there = ((pi >= 0) & (pj >= 0)).nonzero().reshape(-1)
        pi, pj, pv = pi[there], pj[there], P.value[there]
        ci, cj = line.index_select(0, C.row), number.index_select(0, C.column)
        there = ((ci >= 0) & (cj >= 0)).nonzero().reshape(-1)
        ci, cj, cv = ci[there], cj[there], C.value[there]
        norms = torch.zeros(len(kept), dtype=torch.float64).index_add_(0, ci, cv * cv).sqrt()
        self.norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.size = float(pv.abs().max()) if len(pv) else 1.0
        self.size = self.size if self.size > 0 else 1.0
        pv, cv = pv / self.size, cv / self.norms.index_select(0, ci)
        nf, self.order = len(free), len(free) + len(kept)
        row = torch.cat([pi, ci + nf, cj])
        column = torch.cat([pj, cj, ci + nf])
        value = torch.cat([pv, cv, cv])
        # Every run is nearly sorted, which NumPy's stable sort makes use of.
        order = torch.from_numpy((column * self.order + row).numpy().argsort(kind="stable"))
        self.row, self.column, self.value = row[order], column[order], value[order]

    def _factorise(self, delta: float) -> Factor | None:
        row, column, value = self.row, self.column, self.value
        if delta:
            nf = len(self.free_index)
            # Least norm is meant in the multipliers as they are, as far as rows of very uneven size allow.
            uneven = (self.norms.median() / self.norms).square().clamp(1e-3, 1e3) if len(self.norms) else 1.0
            shift = torch.full((self.order,), delta, dtype=torch.float64)
            shift[nf:] = -delta * uneven
            on_diagonal = row == column
            value = value + torch.where(on_diagonal, shift[row], 0.0)
            missing = torch.ones(self.order, dtype=torch.bool)
            missing[row[on_diagonal]] = False
            more = missing.nonzero().reshape(-1)
            row, column = torch.cat([row, more]), torch.cat([column, more])
            value = torch.cat([value, shift[more]])
            order = torch.from_numpy((column * self.order + row).numpy().argsort(kind="stable"))
            row, column, value = row[order], column[order], value[order]
        if not self.order:
            return None
        pointers = torch.zeros(self.order + 1, dtype=torch.int64)
        pointers[1:] = torch.bincount(column, minlength=self.order).cumsum(0)
        matrix = SparseMatrix(
            self.order, pointers.to(torch.int32).numpy(), row.to(torch.int32).numpy(), value.numpy(), True
        )
        try:
            return self.direct.factorise(matrix, {})
        except ArithmeticError:
            return None

    def solve(self, rhs: Tensor) -> tuple[Tensor, bool, bool]:
        """w for ``(V, n + m)``; whether the matrix is singular, and whether w is no solution."""
        linear, rows, bounds = (
            rhs[:, : self.n],
            rhs[:, self.n : self.n + self.rows],
            rhs[:, self.n + self.rows :],
        )
        fixed = self._fixed_values(rows, bounds)
        left = linear - _apply(self.hessian, fixed, self.n)
        lines = rows - _apply(self.matrix, fixed, self.rows)
        reduced = torch.cat(
            [left[:, self.free_index] / self.size, lines[:, self.kept_index] / self.norms], -1
        )
        w, singular, unsolvable = self._solve_reduced(reduced)
        x = fixed
        x[:, self.free_index] = w[:, : len(self.free_index)]
        multipliers = torch.zeros_like(rows)
        multipliers[:, self.kept_index] = w[:, len(self.free_index) :] * self.size / self.norms
        return self._assembled(linear, x, multipliers, bounds.shape[1]), singular, unsolvable

    def _fixed_values(self, rows: Tensor, bounds: Tensor) -> Tensor:
        fixed = rows.new_zeros(len(rows), self.n)
        if self.has_lower:
            fixed = torch.where(self.lower, -bounds[:, : self.n], fixed)
        if self.has_upper:
            fixed = torch.where(self.upper, bounds[:, -self.n :], fixed)
        fixed[:, self.single_column] = rows[:, self.single_row] / self.single_value
        return fixed

    def _assembled(self, linear: Tensor, x: Tensor, multipliers: Tensor, bounds: int) -> Tensor:
        left = linear - _apply(self.hessian, x, self.n)
        left = left - _apply(_transposed(self.matrix), multipliers, self.n)
        multipliers[:, self.single_row] = left[:, self.single_column] / self.single_value
        parts = [x, multipliers]
        if self.has_lower:
            parts.append(torch.where(self.lower, -left, 0.0))
        if self.has_upper:
            parts.append(torch.where(self.upper, left, 0.0))
        return torch.cat(parts, -1)

    def _solve_reduced(self, rhs: Tensor) -> tuple[Tensor, bool, bool]:
        if not self.order:
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
        left = (rhs - self._times(least)).abs().amax()
        return least, True, not bool(left <= _CONSISTENT * rhs.abs().amax())

    def _refined(self, factor: Factor, rhs: Tensor, steps: int) -> tuple[Tensor, float]:
        w, gap, error = torch.zeros_like(rhs), rhs, float("inf")
        for _ in range(steps):
            trial = w + torch.stack([torch.from_numpy(_solved(factor, row)) for row in gap])
            its_gap = rhs - self._times(trial)
            size = rhs.abs().amax() + trial.abs().amax()
            its_error = float(its_gap.abs().amax() / size) if size > 0 else 0.0
            if not its_error < error:  # also for NaN
                break
            w, gap, error = trial, its_gap, its_error
            if error <= _REFINED:
                break
        return w, error

    def _times(self, w: Tensor) -> Tensor:
        picked = self.value * w.index_select(-1, self.column)
        return torch.zeros_like(w).index_add_(-1, self.row, picked)


def _solved(factor: Factor, rhs: Tensor) -> np.ndarray:
    return factor.solve(rhs.contiguous().numpy())


def _grows_little(w: Tensor, rhs: Tensor) -> bool:
    return bool(w.abs().amax() <= _GROWTH * rhs.abs().amax())


def _apply(matrix: _Entries, vectors: Tensor, rows: int) -> Tensor:
    """``(V, n) -> (V, rows)``."""
    picked = matrix.value * vectors.index_select(-1, matrix.column)
    return vectors.new_zeros(len(vectors), rows).index_add_(-1, matrix.row, picked)


def _transposed(matrix: _Entries) -> _Entries:
    return _Entries(matrix.column, matrix.row, matrix.value)
