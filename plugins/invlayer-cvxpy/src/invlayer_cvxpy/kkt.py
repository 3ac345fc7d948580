"""Sparse factors of the Jacobian of a cone program, for polishing and for the derivative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu

import invlayer_core as inv

__all__ = ["RegularisedLU", "bounded"]

_GROWTH = 1e-2  # of 1 / δ: what δ alone keeps finite


@final
@dataclass(frozen=True)
class RegularisedLU(inv.linear.SparseDirectSolver):
    """SuperLU of J + diag(δ, −δ).

    J can be singular although the solution is differentiable: the epigraph variable of a constraint that is
    not active is free to move. Refinement with these factors is then the proximal point method on J x = b
    (Rockafellar 1976): it converges if the system has a solution. If it has none, the answer grows as 1 / δ,
    and becomes NaN: no solution.

    Parameters
    ----------
    size : int
        n; the other unknowns are v.
    delta : float
    """

    size: int
    delta: float = 1e-8

    def factorise(self, matrix: inv.linear.SparseMatrix, options: Mapping[str, Any]) -> inv.linear.Factor:
        if options:
            raise TypeError(f"RegularisedLU takes no options; got {sorted(options)}.")
        columns = np.repeat(np.arange(matrix.size), np.diff(matrix.column_pointers))
        on_diagonal = matrix.rows == columns
        diagonal = np.full(matrix.size, self.delta)
        diagonal[self.size :] = -self.delta
        values = matrix.values + np.where(on_diagonal, diagonal[columns], 0.0)
        J = csc_matrix((values, matrix.rows, matrix.column_pointers), shape=(matrix.size, matrix.size))
        try:
            lu = splu(J, permc_spec="MMD_AT_PLUS_A", relax=1)
        except RuntimeError as error:  # SuperLU's word for exactly singular
            raise ZeroDivisionError(str(error)) from error
        return inv.linear.Factor(
            lambda b: bounded(lu.solve(b), b, self.delta),
            lambda b: bounded(lu.solve(b, trans="T"), b, self.delta),
        )


def bounded(x: np.ndarray, b: np.ndarray, delta: float) -> np.ndarray:
    """x, or NaN where it is as large beside b as only δ keeps it from growing further."""
    limit = _GROWTH / delta * np.abs(b).max(initial=0.0)
    return x if np.abs(x).max(initial=0.0) <= limit else np.full_like(x, np.nan)
