"""One sample's saddle-point matrix by its entries: what is fixed taken out, the rest scaled."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram
from invlayer_core.linear.saddle_point.entries import (
    apply_entries,
    row_entries,
    symmetric_entries,
    transposed,
)
from invlayer_core.solvers.direct import SparseMatrix

__all__ = ["SparseSystem"]


@final
class SparseSystem:
    """One sample: its variables that are free, its active rows, and the matrix over these.

    Parameters
    ----------
    program : QuadraticProgram
        One sample, without batch dims.
    active : Tensor of bool, shape ``(m,)``
    """

    def __init__(self, program: QuadraticProgram, active: Tensor) -> None:
        layout = program.layout
        self.n, self.rows = layout.size, layout.rows
        self.has_lower, self.has_upper = "lb" in layout.names, "ub" in layout.names
        self.hessian = symmetric_entries(program)
        self.matrix = row_entries(program)
        self._fix(active, layout.equalities)
        self._reduce()

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

    def compressed(self, delta: float) -> SparseMatrix:
        """The matrix over what is left; plus δ diag(I, −I)."""
        row, column, value = self.row, self.column, self.value
        if delta:
            row, column, value = self._shifted(delta)
        pointers = torch.zeros(self.order + 1, dtype=torch.int64)
        pointers[1:] = torch.bincount(column, minlength=self.order).cumsum(0)
        return SparseMatrix(
            self.order, pointers.to(torch.int32).numpy(), row.to(torch.int32).numpy(), value.numpy(), True
        )

    def _shifted(self, delta: float) -> tuple[Tensor, Tensor, Tensor]:
        row, column, value = self.row, self.column, self.value
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
        return row[order], column[order], value[order]

    def reduced(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The right-hand side ``(V, n + m)`` of what is left, scaled; and the variables that are fixed."""
        linear, rows, bounds = rhs.split((self.n, self.rows, rhs.shape[1] - self.n - self.rows), -1)
        fixed = self._fixed_values(rows, bounds)
        left = linear - apply_entries(self.hessian, fixed, self.n)
        lines = rows - apply_entries(self.matrix, fixed, self.rows)
        scaled = left[:, self.free_index] / self.size, lines[:, self.kept_index] / self.norms
        return torch.cat(scaled, -1), fixed

    def whole(self, rhs: Tensor, w: Tensor, x: Tensor) -> Tensor:
        """(x, μ) in the order of z, of the solution of what is left; writes into the fixed variables x."""
        linear, rows = rhs[:, : self.n], rhs[:, self.n : self.n + self.rows]
        x[:, self.free_index] = w[:, : len(self.free_index)]
        multipliers = torch.zeros_like(rows)
        multipliers[:, self.kept_index] = w[:, len(self.free_index) :] * self.size / self.norms
        return self._assembled(linear, x, multipliers)

    def _fixed_values(self, rows: Tensor, bounds: Tensor) -> Tensor:
        fixed = rows.new_zeros(len(rows), self.n)
        if self.has_lower:
            fixed = torch.where(self.lower, -bounds[:, : self.n], fixed)
        if self.has_upper:
            fixed = torch.where(self.upper, bounds[:, -self.n :], fixed)
        fixed[:, self.single_column] = rows[:, self.single_row] / self.single_value
        return fixed

    def _assembled(self, linear: Tensor, x: Tensor, multipliers: Tensor) -> Tensor:
        left = linear - apply_entries(self.hessian, x, self.n)
        left = left - apply_entries(transposed(self.matrix), multipliers, self.n)
        multipliers[:, self.single_row] = left[:, self.single_column] / self.single_value
        parts = [x, multipliers]
        if self.has_lower:
            parts.append(torch.where(self.lower, -left, 0.0))
        if self.has_upper:
            parts.append(torch.where(self.upper, left, 0.0))
        return torch.cat(parts, -1)

    def times(self, w: Tensor) -> Tensor:
        """The matrix over what is left, times ``(V, order)``."""
        picked = self.value * w.index_select(-1, self.column)
        return torch.zeros_like(w).index_add_(-1, self.row, picked)
