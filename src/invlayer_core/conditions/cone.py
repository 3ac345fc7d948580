"""Cone programs: minimise ½ xᵀP x + qᵀx subject to A x + s = b, s ∈ K.

x, s and the dual y are a solution if P x + q + Aᵀy = 0, A x + s = b, s ∈ K, y ∈ K*, sᵀy = 0. With v = y − s
the last three say y = Π_K*(v) and s = y − v (Moreau 1965), and what remains is one equation for (x, v):

    F(x, v) = [P x + q + Aᵀ Π_K*(v);  A x + Π_K*(v) − v − b] = 0

(the residual map of Busseti, Moursi & Boyd 2019, Solution refinement at regular points of conic problems,
with the objective kept quadratic). Its Jacobian is [[P, AᵀD], [A, D − I]], D = dΠ_K*(v).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.product import Cones
from invlayer_core.errors import ConditionsError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ConeConditions", "ConeJacobian", "ConeSolution", "ConeStructure", "scatter_sum"]


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


@final
@dataclass(frozen=True, eq=False)
class ConeStructure:
    """Which cone, and where P and A can be non-zero: what all programs of a batch have in common.

    Parameters
    ----------
    size : int
        n, the number of variables.
    cones : Cones
        K, for vectors of m entries.
    P : pair of Tensor
        Rows and columns of the entries of the upper triangle of P, ``(nnz,)`` each, each entry once.
    A : pair of Tensor
        Rows and columns of the entries of A, m × n.

    Raises
    ------
    ConditionsError
        If indices are out of range, or P has entries below its diagonal.

    Examples
    --------
    >>> ConeStructure.dense(size=2, cones=Cones(nonneg=3))
    ConeStructure(n = 2, m = 3, 3 + 6 entries)
    """

    size: int
    cones: Cones
    P: tuple[Tensor, Tensor]
    A: tuple[Tensor, Tensor]

    def __post_init__(self) -> None:
        for name, rows in (("P", self.size), ("A", self.equations)):
            index = getattr(self, name)
            for part, limit in zip(index, (rows, self.size), strict=True):
                if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < limit:
                    raise ConditionsError(
                        f"ConeStructure: {name} has indices from {int(part.min())} to {int(part.max())}; "
                        f"accepted are 0 to {limit - 1}."
                    )
        if bool((self.P[0] > self.P[1]).any()):
            raise ConditionsError(
                "ConeStructure: P has entries below its diagonal; accepted is the upper triangle."
            )

    @classmethod
    def dense(cls, size: int, cones: Cones) -> ConeStructure:
        """Every entry of P and A can be non-zero; those of A row by row."""
        rows, cols = torch.triu_indices(size, size)
        m = cones.size
        places = torch.arange(m * size)
        return cls(size, cones, (rows, cols), (places // max(size, 1), places % max(size, 1)))

    def compressed(self, name: Literal["P", "A"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and column pointers of the CSC form, and the order of the entries in it; NumPy, int64."""
        if name not in self._compressed:
            rows, cols = getattr(self, name)
            order = torch.argsort(cols * max(self.size, self.equations, 1) + rows)
            counts = torch.bincount(cols, minlength=self.size).cumsum(0)
            pointers = torch.cat([counts.new_zeros(1), counts])
            self._compressed[name] = (rows[order].numpy(), pointers.numpy(), order.numpy())
        return self._compressed[name]

    @cached_property
    def _compressed(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return {}

    @property
    def equations(self) -> int:
        """m, the number of entries of a vector in K."""
        return self.cones.size

    def __repr__(self) -> str:
        entries = f"{self.P[0].numel()} + {self.A[0].numel()} entries"
        return f"ConeStructure(n = {self.size}, m = {self.equations}, {entries})"


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


@final
@dataclass(frozen=True, eq=False)
class ConeJacobian:
    """∂F/∂z as dense blocks ``(*batch, n + m, n + m)``, differentiable."""

    structure: ConeStructure

    def __call__(self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        structure, batch = self.structure, z.shape[:-1]
        n, m = structure.size, structure.equations
        upper = _dense(P, *structure.P, (n, n))
        hessian = upper + upper.mT - torch.diag_embed(upper.diagonal(dim1=-2, dim2=-1))
        matrix = _dense(A, *structure.A, (m, n))
        rows, corner = self._derivative(z[..., n:], matrix.expand(*batch, m, n))
        left = torch.cat([hessian.expand(*batch, n, n), matrix.expand(*batch, m, n)], -2)
        identity = torch.eye(m, dtype=z.dtype, device=z.device)
        return torch.cat([left, torch.cat([rows.mT, corner - identity], -2)], -1)

    def _derivative(self, v: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """D A ``(*batch, m, n)`` and D ``(*batch, m, m)``; D is symmetric and has a block for each cone."""
        cones, m = self.structure.cones, self.structure.equations
        products, values, places = [matrix[..., :0, :]], [v[..., :0]], [torch.arange(0, device=v.device)]
        for group in cones.groups:
            entries = group.entries.to(v.device)
            block = group.family.derivative(cones.taken(group, v))
            rows = matrix[..., entries.reshape(-1), :]
            if group.family.diagonal:
                products.append(block.flatten(-2).unsqueeze(-1) * rows)
                places.append(entries.reshape(-1) * (m + 1))
            else:
                blocked = rows.reshape(*rows.shape[:-2], *entries.shape, rows.shape[-1])
                products.append((block @ blocked).reshape(rows.shape))
                places.append((entries.unsqueeze(-1) * m + entries.unsqueeze(-2)).reshape(-1))
            values.append(block.flatten(-2 if group.family.diagonal else -3))
        corner = scatter_sum(torch.cat(values, -1), torch.cat(places), m * m)
        product = torch.cat(products, -2)
        if not cones.is_sorted:
            product = product[..., cones.order.to(v.device), :]
        return product, corner.reshape(*v.shape[:-1], m, m)


def _dense(values: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    flat = scatter_sum(values, rows * shape[1] + cols, shape[0] * shape[1])
    return flat.reshape(*values.shape[:-1], *shape)
