"""Factors of the Jacobian of a cone program with many non-zeros: one Cholesky factorisation of size n.

With G = (I − D + δ)⁻¹, block by block, J + diag(δ, −δ) has the Schur complement

    H = P + δ + Aᵀ D G A,

symmetric and positive definite, since D is a projection's derivative, 0 ≤ D ≤ I. Rows of inequalities that
are not active have D = 0 and drop out. δ costs no accuracy: see :class:`RegularisedLU`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csc_matrix

import invlayer_core as inv
from invlayer_cvxpy.kkt import bounded

__all__ = ["SchurCholesky"]


@final
@dataclass(frozen=True)
class SchurCholesky(inv.linear.SparseDirectSolver):
    """Cholesky factors of the Schur complement.

    Parameters
    ----------
    size : int
        n; the other unknowns are v.
    cones : Cones
    delta : float
    """

    size: int
    cones: inv.Cones
    delta: float = 1e-7

    def factorise(self, matrix: inv.linear.SparseMatrix, options: Mapping[str, Any]) -> inv.linear.Factor:
        if options:
            raise TypeError(f"SchurCholesky takes no options; got {sorted(options)}.")
        n = self.size
        J = csc_matrix((matrix.values, matrix.rows, matrix.column_pointers), shape=(matrix.size, matrix.size))
        left = J[:, :n].toarray(order="F")
        P, A = left[:n], left[n:]
        blocks = _Blocks.of(J[n:, n:], self.cones, self.delta)
        H = P + blocks.weighed(A)
        H[np.diag_indices(n)] += self.delta
        try:
            factor = cho_factor(H, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError as error:
            raise ZeroDivisionError(str(error)) from error

        def solve(b: np.ndarray) -> np.ndarray:
            first, second = b[:n], blocks.times_gain(b[n:])
            x = cho_solve(factor, first + A.T @ blocks.times_derivative(second), check_finite=False)
            return bounded(np.concatenate([x, blocks.times_gain(A @ x) - second]), b, self.delta)

        def solve_transposed(b: np.ndarray) -> np.ndarray:
            x = cho_solve(factor, b[:n] + A.T @ blocks.times_gain(b[n:]), check_finite=False)
            v = blocks.times_gain(blocks.times_derivative(A @ x) - b[n:])
            return bounded(np.concatenate([x, v]), b, self.delta)

        return inv.linear.Factor(solve, solve_transposed)


@final
@dataclass(frozen=True)
class _Blocks:
    """D and G: their diagonals where D is diagonal, and blocks with the entries that they belong to."""

    derivative: np.ndarray
    gain: np.ndarray
    curved: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # entries (count, k), D and G (count, k, k)

    @classmethod
    def of(cls, corner: csc_matrix, cones: inv.Cones, delta: float) -> _Blocks:
        """From D − I, which is all that the corner of J has."""
        derivative = corner.diagonal() + 1.0
        gain = 1.0 / (1.0 - derivative + delta)
        curved = []
        for group in cones.groups:
            if group.family.diagonal:
                continue
            entries = group.entries.numpy()
            k = entries.shape[1]
            rows = np.repeat(entries, k, axis=1).reshape(-1)
            cols = np.tile(entries, (1, k)).reshape(-1)
            block = np.asarray(corner[rows, cols]).reshape(-1, k, k) + np.eye(k)
            block = 0.5 * (block + block.transpose(0, 2, 1))
            curved.append((entries, block, np.linalg.inv((1.0 + delta) * np.eye(k) - block)))
            derivative[entries] = gain[entries] = 0.0
        return cls(derivative, gain, curved)

    def times_derivative(self, v: np.ndarray) -> np.ndarray:
        """D v."""
        result = self.derivative * v
        for entries, block, _ in self.curved:
            result[entries] = np.einsum("cij,cj->ci", block, v[entries])
        return result

    def times_gain(self, v: np.ndarray) -> np.ndarray:
        """G v."""
        result = self.gain * v
        for entries, _, block in self.curved:
            result[entries] = np.einsum("cij,cj->ci", block, v[entries])
        return result

    def weighed(self, A: np.ndarray) -> np.ndarray:
        """Aᵀ D G A."""
        weights = self.derivative * self.gain
        active = np.flatnonzero(weights)
        rows = A[active] * np.sqrt(weights[active])[:, None]
        total: np.ndarray = rows.T @ rows
        for entries, derivative, gain in self.curved:
            part = A[entries]
            weighed = (derivative @ gain) @ part
            total += part.reshape(-1, A.shape[1]).T @ weighed.reshape(-1, A.shape[1])
        return total
