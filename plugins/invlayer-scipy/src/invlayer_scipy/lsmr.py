"""SciPy's LSMR as a linear solver for the derivative: products with the sparse matrix, and no factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix
from scipy.sparse.linalg import lsmr

import invlayer_core as inv

__all__ = ["Lsmr"]

_NAMES: Final = ("atol", "btol", "maxiter")
_DEFAULTS: Final = {"atol": 1e-14, "btol": 1e-14}
_SWEEPS: Final = 5
_STEPS: Final = 20  # per unknown; rounding makes it take more than one


@final
class Lsmr(inv.linear.SparseDirectSolver):
    """``scipy.sparse.linalg.lsmr`` (Fong & Saunders 2011), on the equilibrated matrix (Ruiz 2001).

    For matrices whose factors would be too large, and for singular ones, for which it finds the solution of
    least norm, in the scaled unknowns, where there is one. Iterations grow with the condition number. Options
    are SciPy's ``atol``, ``btol`` (1e-14 instead of 1e-6) and ``maxiter`` (20 for each unknown).
    """

    def factorise(self, matrix: inv.linear.SparseMatrix, options: Mapping[str, Any]) -> inv.linear.Factor:
        unknown = sorted(set(options) - set(_NAMES))
        if unknown:
            raise TypeError(
                f"scipy.lsmr: unknown option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; accepted "
                f"are {', '.join(_NAMES)}, as in scipy.sparse.linalg.lsmr."
            )
        A = csc_matrix((matrix.values, matrix.rows, matrix.column_pointers), shape=(matrix.size, matrix.size))
        A, by_row, by_column = _equilibrated(A)
        transposed = csr_matrix((A.data, A.indices, A.indptr), shape=A.shape)  # Aᵀ, sharing its arrays
        settings = {"maxiter": _STEPS * matrix.size, **_DEFAULTS, **options, "conlim": 0.0}
        return inv.linear.Factor(
            lambda b: by_column * lsmr(A, by_row * b, **settings)[0],
            lambda b: by_row * lsmr(transposed, by_column * b, **settings)[0],
        )


def _equilibrated(matrix: csc_matrix) -> tuple[csc_matrix, np.ndarray, np.ndarray]:
    """R A C with rows and columns whose largest entries are near 1; R and C as their diagonals."""
    scaled = matrix.copy()
    by_row, by_column = np.ones(matrix.shape[0]), np.ones(matrix.shape[1])
    columns = np.repeat(np.arange(matrix.shape[1]), np.diff(matrix.indptr))
    for _ in range(_SWEEPS):
        sizes = abs(scaled)
        rows, cols = (_roots(sizes.max(axis).toarray().reshape(-1)) for axis in (1, 0))
        scaled.data /= rows[scaled.indices] * cols[columns]
        by_row, by_column = by_row / rows, by_column / cols
    return scaled, by_row, by_column


def _roots(largest: np.ndarray) -> np.ndarray:
    roots: np.ndarray = np.sqrt(np.where(largest > 0, largest, 1.0))
    return roots
