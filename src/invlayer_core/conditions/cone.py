"""Cone programs: minimise ½ xᵀP x + qᵀx subject to A x + s = b, s ∈ K.

x, s and the dual y are a solution if P x + q + Aᵀy = 0, A x + s = b, s ∈ K, y ∈ K*, sᵀy = 0. With v = y − s
the last three say y = Π_K*(v) and s = y − v (Moreau 1965), and what remains is one equation for (x, v):

    F(x, v) = [P x + q + Aᵀ Π_K*(v);  A x + Π_K*(v) − v − b] = 0

(the residual map of Busseti, Moursi & Boyd 2019, Solution refinement at regular points of conic problems,
with the objective kept quadratic). Its Jacobian is [[P, AᵀD], [A, D − I]], D = dΠ_K*(v).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.structure import ConeStructure

__all__ = ["ConeConditions", "ConeSolution", "scatter_sum"]


@final
class ConeSolution(NamedTuple):
    """The solution of a cone program.

    Attributes
    ----------
    x : Tensor of shape ``(*batch, n)``
    y : Tensor of shape ``(*batch, m)``
        The dual variable, in K*.
    s : Tensor of shape ``(*batch, m)``
        The slack, in K.
    """

    x: Tensor
    y: Tensor
    s: Tensor


def scatter_sum(values: Tensor, places: Tensor, size: int) -> Tensor:
    """``(*batch, nnz)`` values added up at their ``places`` in ``(*batch, size)``."""
    index = places.to(values.device).expand(values.shape)
    return values.new_zeros(*values.shape[:-1], size).scatter_add(-1, index, values)


def _taken(vector: Tensor, places: Tensor) -> Tensor:
    """``vector[..., places]``, whose derivative on the CPU is then a scatter instead of a loop."""
    return vector.gather(-1, places.to(vector.device).expand(*vector.shape[:-1], -1))


def _times(values: Tensor, rows: Tensor, cols: Tensor, size: int, vector: Tensor) -> Tensor:
    """A sparse matrix times a vector, both batched or not."""
    return scatter_sum(values * _taken(vector, cols), rows, size)


@final
@dataclass(frozen=True, eq=False)
class ConeConditions:
    """F(z, P, q, A, b) with z = (x, v), ``(*batch, n + m)``; P and A by their entries.

    The four may be batched or not, each for itself.
    """

    structure: ConeStructure

    def __call__(self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        structure = self.structure
        n, m = structure.size, structure.equations
        x, v = z[..., :n], z[..., n:]
        y = structure.cones.project_dual(v)
        (rows, cols), (up, across) = structure.A, structure.P
        stationarity = q + _times(A, cols, rows, n, y) + _times(P, up, across, n, x)
        below = (up != across).to(x)  # the lower triangle, without the diagonal
        stationarity = stationarity + _times(P * below, across, up, n, x)
        return torch.cat([stationarity, _times(A, rows, cols, m, x) + y - v - b], -1)

    def solution(self, z: Tensor) -> ConeSolution:
        """x, y and s of z, differentiable."""
        n = self.structure.size
        y = self.structure.cones.project_dual(z[..., n:])
        return ConeSolution(z[..., :n], y, y - z[..., n:])
