"""One sample's saddle-point matrix by its entries: what is fixed taken out, the rest scaled."""

from __future__ import annotations

from typing import final

import numpy as np

from invlayer_core.linear.saddle_point.entries import Entries, stable_order
from invlayer_core.solvers.direct import SparseMatrix

__all__ = ["SparseSystem"]


@final
class SparseSystem:
    """One sample: its variables that are free, its active rows, and the matrix over these.

    Parameters
    ----------
    hessian : Entries
        ½ (P + Pᵀ), row by row.
    matrix : Entries
        A above G, row by row.
    active : ndarray of bool, shape ``(m,)``
        Of the rows of A and G, and of the lower and upper bounds, where there are any.
    equalities : int
    has_lower, has_upper : bool
    """

    def __init__(
        self,
        hessian: Entries,
        matrix: Entries,
        active: np.ndarray,
        equalities: int,
        has_lower: bool,
        has_upper: bool,
    ) -> None:
        self.n, self.rows = hessian.shape[0], matrix.shape[0]
        self.hessian, self.matrix = hessian, matrix
        self.has_lower, self.has_upper = has_lower, has_upper
        self._fix(active, equalities)
        self._reduce()

    def _fix(self, active: np.ndarray, equalities: int) -> None:
        """The variables that stand at a bound, or that a row with one entry fixes."""
        bounds, nothing = active[self.rows :], np.zeros(self.n, dtype=bool)
        self.lower = bounds[: self.n] if self.has_lower else nothing
        self.upper = (bounds[-self.n :] & ~self.lower) if self.has_upper else nothing
        fixed, kept = self.lower | self.upper, active[: self.rows].copy()
        row, column, value = self.matrix.row, self.matrix.column, self.matrix.value
        alone = (np.bincount(row, minlength=self.rows) == 1) & kept
        alone[:equalities] = False
        single = np.zeros(0, dtype=np.int64)
        if alone.any():
            single = (alone[row] & ~fixed[column] & (value != 0)).nonzero()[0]
            owner = np.full(self.n, -1)
            owner[column[single]] = single
            single = owner[owner >= 0]  # one for each variable; others stay rows
            fixed[column[single]] = True
            kept[row[single]] = False
        self.single_row, self.single_column = row[single], column[single]
        self.single_value = value[single]
        self.free_index, self.kept_index = (~fixed).nonzero()[0], kept.nonzero()[0]
        self._fixed, self._kept = fixed, kept

    def _reduce(self) -> None:
        """The matrix over free variables and kept rows, as entries in the order of its columns."""
        P, C, nf = self.hessian, self.matrix, len(self.free_index)
        there = self._kept[C.row]
        if nf < self.n:
            number = np.cumsum(~self._fixed) - 1
            there &= ~self._fixed[C.column]
            inside = (~(self._fixed[P.row] | self._fixed[P.column])).nonzero()[0]
            pi, pj, pv = number[P.row[inside]], number[P.column[inside]], P.value[inside]
        else:
            pi, pj, pv = P.row, P.column, P.value
        there = there.nonzero()[0]
        ci, cj, cv = (np.cumsum(self._kept) - 1)[C.row[there]], C.column[there], C.value[there]
        if nf < self.n:
            cj = number[cj]
        norms = np.sqrt(np.bincount(ci, cv * cv, len(self.kept_index)))
        norms[norms == 0] = 1.0
        self.norms = norms
        self.size = float(np.abs(pv).max(initial=0.0)) or 1.0
        cv = cv / norms[ci]
        self.order = nf + len(self.kept_index)
        # P is symmetric and C goes row by row, so that rows ascend within a column as they come.
        column = np.concatenate([pi, cj, ci + nf])
        order = stable_order(column, self.order)
        row = np.concatenate([pj, ci + nf, cj])[order]
        value = np.concatenate([pv / self.size, cv, cv])[order]
        self.entries = Entries((self.order, self.order), row, column[order], value)

    def compressed(self, delta: float) -> SparseMatrix:
        """The matrix over what is left; plus δ diag(I, −I)."""
        entries = self._shifted(delta) if delta else self.entries
        pointers = np.zeros(self.order + 1, dtype=np.int32)
        np.cumsum(np.bincount(entries.column, minlength=self.order), out=pointers[1:])
        return SparseMatrix(self.order, pointers, entries.row.astype(np.int32), entries.value, True)

    def _shifted(self, delta: float) -> Entries:
        row, column, value = self.entries.row, self.entries.column, self.entries.value
        nf = len(self.free_index)
        # Least norm is meant in the multipliers as they are, as far as rows of very uneven size allow.
        shift = np.full(self.order, delta)
        if len(self.norms):
            middle = np.sort(self.norms)[(len(self.norms) - 1) // 2]
            shift[nf:] = -delta * ((middle / self.norms) ** 2).clip(1e-3, 1e3)
        on_diagonal = row == column
        value = value + np.where(on_diagonal, shift[row], 0.0)
        missing = np.ones(self.order, dtype=bool)
        missing[row[on_diagonal]] = False
        more = missing.nonzero()[0]
        row, column = np.concatenate([row, more]), np.concatenate([column, more])
        # Transposed, it is the same: so what goes row by row goes column by column, too.
        whole = Entries((self.order, self.order), column, row, np.concatenate([value, shift[more]]))
        return whole.by_rows().T

    def reduced(self, rhs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The right-hand side of what is left, scaled, ``(n + m,) -> (order,)``; and the fixed variables."""
        linear, limits = rhs[: self.n], rhs[self.n : self.n + self.rows]
        fixed = self._fixed_values(limits, rhs[self.n + self.rows :])
        if len(self.free_index) < self.n:
            linear, limits = linear - self.hessian @ fixed, limits - self.matrix @ fixed
        scaled = linear[self.free_index] / self.size, limits[self.kept_index] / self.norms
        return np.concatenate(scaled), fixed

    def _fixed_values(self, limits: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        fixed = np.zeros(self.n)
        if self.has_lower:
            fixed = np.where(self.lower, -bounds[: self.n], fixed)
        if self.has_upper:
            fixed = np.where(self.upper, bounds[-self.n :], fixed)
        fixed[self.single_column] = limits[self.single_row] / self.single_value
        return fixed

    def whole(self, rhs: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(x, μ) in the order of z, of the solution of what is left; writes into the fixed variables x."""
        nf = len(self.free_index)
        x[self.free_index] = w[:nf]
        multipliers = np.zeros(self.rows)
        multipliers[self.kept_index] = w[nf:] * self.size / self.norms
        left = np.zeros(self.n)  # where nothing is fixed, no one asks
        if nf < self.n:
            left = rhs[: self.n] - self.hessian @ x - self.matrix.T @ multipliers
            multipliers[self.single_row] = left[self.single_column] / self.single_value
        parts = [x, multipliers]
        if self.has_lower:
            parts.append(np.where(self.lower, -left, 0.0))
        if self.has_upper:
            parts.append(np.where(self.upper, left, 0.0))
        return np.concatenate(parts)
