"""The sparse Jacobian of the conditions at one sample: assembled by index, factorised by SuperLU when asked.

Rows as in ``conditions.py``, unknowns (x, λ, ν):

    [ H     ∂gᵀ         I          ]
    [ Θ ∂g  −(1 − Θ) s  0          ]
    [ Θ     0           −(1 − Θ) s ]
"""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu

from invlayer_casadi.nlp.program import NlpProgram

__all__ = ["KKTMatrix", "KKTPattern"]

_SOLVED: Final = 5e-14  # of the right-hand side
_REFINEMENTS: Final = 3


@final
class KKTPattern:
    """Where the entries are, shared by all samples: CSC index arrays, and where each value goes in them."""

    def __init__(self, program: NlpProgram) -> None:
        n, m = program.unknowns, program.constraints
        self.size, self.constraints, self.unknowns = 2 * n + m, m, n
        h_rows, h_columns = program.hessian_places
        self.jacobian_rows, j_columns = program.jacobian_places
        of_x, of_g, of_v = np.arange(n), n + np.arange(m), n + m + np.arange(n)
        rows = [h_rows, j_columns, of_x, n + self.jacobian_rows, of_g, of_v, of_v]
        columns = [h_columns, n + self.jacobian_rows, of_v, j_columns, of_g, of_x, of_v]
        self.rows, self.columns = np.concatenate(rows), np.concatenate(columns)
        self.order = np.lexsort((self.rows, self.columns))
        self.indices = self.rows[self.order].astype(np.int32)
        counts = np.bincount(self.columns, minlength=self.size)
        self.pointers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self._ones = np.ones(n)

    def values(
        self, hessian: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, scale: float
    ) -> np.ndarray:
        """The entries, in the order of ``rows`` and ``columns``; the weights are θ of g and x joined."""
        of_g, of_x = weights[: self.constraints], weights[self.constraints :]
        return np.concatenate(
            [
                *(hessian, jacobian, self._ones, of_g[self.jacobian_rows] * jacobian),
                *(-(1.0 - of_g) * scale, of_x, -(1.0 - of_x) * scale),
            ]
        )

    def assembled(self, values: np.ndarray) -> csc_matrix:
        """The matrix of these entries."""
        matrix = csc_matrix((values[self.order], self.indices, self.pointers), (self.size, self.size))
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        return matrix

    def product(self, values: np.ndarray, vector: np.ndarray, way: str) -> np.ndarray:
        """J or Jᵀ times a vector."""
        to, of = (self.rows, self.columns) if way == "N" else (self.columns, self.rows)
        return np.bincount(to, values * vector[of], self.size)


@final
class KKTMatrix:
    """The Jacobian at one sample; factorised on the first solve, unless the factor of one nearby will do.

    Parameters
    ----------
    pattern : KKTPattern
    hessian, jacobian, weights : ndarray
    scale : float
    nearby : KKTMatrix, optional
        That of the last Newton step: with refinement its factor solves with this matrix, too.
    """

    def __init__(
        self,
        pattern: KKTPattern,
        hessian: np.ndarray,
        jacobian: np.ndarray,
        weights: np.ndarray,
        scale: float,
        nearby: KKTMatrix | None = None,
    ) -> None:
        self._pattern, self._values = pattern, pattern.values(hessian, jacobian, weights, scale)
        self._factor: Any = None if nearby is None else nearby._factor
        self._borrowed = self._factor is not None

    def _solve(self, rhs: np.ndarray, way: str) -> np.ndarray:
        """Refined, which costs less here than a product with F's own derivative."""
        if self._factor is None and not self._factorise():
            return np.full_like(rhs, np.nan)
        solution: np.ndarray = self._factor.solve(rhs, way)
        size = np.abs(rhs).max(initial=0.0)
        for _ in range(_REFINEMENTS):
            missing = rhs - self._pattern.product(self._values, solution, way)
            gap = np.abs(missing).max(initial=0.0)
            if gap <= _SOLVED * size:
                break
            solution = solution + self._factor.solve(missing, way)
        else:
            if self._borrowed:  # the factor is that of another active set, or of a point too far away
                self._factor, self._borrowed = None, False
                return self._solve(rhs, way)
        return solution

    def _factorise(self) -> bool:
        """False if the matrix is exactly singular."""
        try:
            self._factor = splu(
                self._pattern.assembled(self._values), permc_spec="COLAMD", relax=1, panel_size=1
            )
        except RuntimeError:
            return False
        return True

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """J⁻¹ rhs; NaN if J is singular."""
        return self._solve(rhs, "N")

    def solve_transposed(self, rhs: np.ndarray) -> np.ndarray:
        """J⁻ᵀ rhs; NaN if J is singular."""
        return self._solve(rhs, "T")
