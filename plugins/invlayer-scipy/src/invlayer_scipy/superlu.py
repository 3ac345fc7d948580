"""SciPy's SuperLU as a sparse direct solver for the derivative."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import MatrixRankWarning, splu

import invlayer_core as inv

__all__ = ["Splu"]

_NAMES: Final = ("permc_spec", "diag_pivot_thresh", "relax", "panel_size")


@final
class Splu(inv.linear.SparseDirectSolver):
    """``scipy.sparse.linalg.splu`` (Li 2005).

    Two defaults differ from SciPy's: where the pattern is symmetric, as that of most discretised equations
    is, columns are ordered by minimum degree on Aᵀ + A, which makes about half the fill of COLAMD there; and
    supernodes are not relaxed. Row pivoting stays as it is.
    """

    def factorise(self, matrix: inv.linear.SparseMatrix, options: Mapping[str, Any]) -> inv.linear.Factor:
        unknown = sorted(set(options) - {*_NAMES, "options"})
        if unknown:
            raise TypeError(
                f"scipy.splu: unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; accepted "
                f"are {', '.join(_NAMES)} and options, as in scipy.sparse.linalg.splu."
            )
        defaults = (
            {"permc_spec": "MMD_AT_PLUS_A", "relax": 1, "panel_size": 1} if matrix.symmetric_pattern else {}
        )
        assembled = csc_matrix(
            (matrix.values, matrix.rows, matrix.column_pointers), shape=(matrix.size, matrix.size)
        )
        assembled.has_sorted_indices = assembled.has_canonical_format = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MatrixRankWarning)
            try:
                lu = splu(assembled, **{**defaults, **options})
            except RuntimeError as error:  # "Factor is exactly singular"
                raise ZeroDivisionError(str(error)) from error

        def solve_transposed(rhs: np.ndarray) -> np.ndarray:
            solution: np.ndarray = lu.solve(rhs, "T")
            return solution

        return inv.linear.Factor(lu.solve, solve_transposed)
