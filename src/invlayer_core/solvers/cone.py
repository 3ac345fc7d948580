"""What a solver of cone programs is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from invlayer_core.conditions.cone import ConeConditions
from invlayer_core.conditions.cone_jacobian import ConeJacobian
from invlayer_core.conditions.cones.structure import ConeStructure
from invlayer_core.solvers.contract import Problem

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CSC", "ConeProblem"]


@final
@dataclass(frozen=True, eq=False)
class CSC:
    """A sparse matrix in compressed sparse column form, in NumPy.

    Attributes
    ----------
    values : ndarray of float64 ``(nnz,)``
    rows : ndarray of int64 ``(nnz,)``
    pointers : ndarray of int64 ``(columns + 1,)``
        Column j is made of the entries ``pointers[j]`` to ``pointers[j + 1]``.
    shape : pair of int
    """

    values: np.ndarray
    rows: np.ndarray
    pointers: np.ndarray
    shape: tuple[int, int]


@final
@dataclass(frozen=True, eq=False)
class ConeProblem(Problem):
    """Minimise ½ xᵀP x + qᵀx subject to A x + s = b, s ∈ K: one program, in float64 NumPy.

    Attributes
    ----------
    structure : ConeStructure
        K, and where P and A can be non-zero.
    P, A : ndarray
        Their entries, in the order of the structure; P by its upper triangle.
    q, b : ndarray of shape ``(n,)`` and ``(m,)``
    index : int
        Which sample of the batch this is.
    start : tuple of ndarray or None
        x, y and s to start from, if there are any.
    """

    structure: ConeStructure
    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    index: int = 0
    start: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    kind: str = "cone"

    @property
    def size(self) -> int:  # type: ignore[override]
        """n + m."""
        return self.structure.size + self.structure.equations

    @property
    def P_matrix(self) -> CSC:  # noqa: N802
        """The upper triangle of P."""
        rows, pointers, order = self.structure.compressed("P")
        return CSC(self.P[order], rows, pointers, (self.structure.size, self.structure.size))

    @property
    def A_matrix(self) -> CSC:  # noqa: N802
        """A, m × n."""
        rows, pointers, order = self.structure.compressed("A")
        return CSC(self.A[order], rows, pointers, (self.structure.equations, self.structure.size))

    def joined(self, x: np.ndarray, y: np.ndarray, s: np.ndarray) -> np.ndarray:
        """x and v = y − s as one vector: what ``SolverResult.y`` of this kind is."""
        joined: np.ndarray = torch.cat([torch.as_tensor(x), torch.as_tensor(y) - torch.as_tensor(s)]).numpy()
        return joined

    def residual(self, y: np.ndarray) -> np.ndarray:
        value: np.ndarray = ConeConditions(self.structure)(*self._at(y)).numpy()
        return value

    def jacobian(self, y: np.ndarray) -> np.ndarray:
        value: np.ndarray = ConeJacobian(self.structure)(*self._at(y)).numpy()
        return value

    def second_derivative(self, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError("second derivatives are for scalar equations, not for cone programs")

    def _at(self, y: np.ndarray) -> list[torch.Tensor]:
        return [torch.as_tensor(array) for array in (y, self.P, self.q, self.A, self.b)]
