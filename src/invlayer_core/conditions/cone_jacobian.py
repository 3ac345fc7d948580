"""The Jacobian of the conditions of a cone program: [[P, AᵀD], [A, D − I]], D = dΠ_K*(v)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.cone import scatter_sum
from invlayer_core.conditions.cones.structure import ConeStructure
from invlayer_core.conditions.system import SparseJacobian

__all__ = ["ConeJacobian"]


@final
@dataclass(frozen=True, eq=False)
class ConeJacobian(SparseJacobian):
    """∂F/∂z as dense blocks ``(*batch, n + m, n + m)``, or by its entries; differentiable."""

    structure: ConeStructure

    @property
    def places(self) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        return self.structure.places

    def __call__(self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        structure, batch = self.structure, z.shape[:-1]
        n, m = structure.size, structure.equations
        upper = _dense(P, *structure.P, (n, n))
        hessian = upper + upper.mT - torch.diag_embed(upper.diagonal(dim1=-2, dim2=-1))
        matrix = _dense(A, *structure.A, (m, n))
        rows, corner = self._derivative(z[..., n:], matrix)
        if not _is_recorded(z, P, A):  # half the copies
            whole = z.new_empty(*batch, n + m, n + m)
            whole[..., :n, :n], whole[..., n:, :n] = hessian, matrix
            whole[..., :n, n:], whole[..., n:, n:] = rows.mT, corner
            whole.diagonal(dim1=-2, dim2=-1)[..., n:] -= 1.0
            return whole
        left = torch.cat([hessian.expand(*batch, n, n), matrix.expand(*batch, m, n)], -2)
        identity = torch.eye(m, dtype=z.dtype, device=z.device)
        return torch.cat([left, torch.cat([rows.mT, corner - identity], -2)], -1)

    def _derivative(self, v: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """D A ``(*batch, m, n)`` and D ``(*batch, m, m)``; D is symmetric and has a block for each cone."""
        cones, m = self.structure.cones, self.structure.equations
        products = [v.new_zeros(*v.shape[:-1], 0, matrix.shape[-1])]
        values, places = [v[..., :0]], [torch.arange(0, device=v.device)]
        for group in cones.groups:
            entries = group.entries.to(v.device)
            block = group.family.derivative(cones.taken(group, v))
            rows = matrix[..., entries.reshape(-1), :]
            if group.family.diagonal:
                products.append(block.flatten(-2).unsqueeze(-1) * rows)
                places.append(entries.reshape(-1) * (m + 1))
            else:
                blocked = rows.reshape(*rows.shape[:-2], *entries.shape, rows.shape[-1])
                products.append((block @ blocked).flatten(-3, -2))
                places.append((entries.unsqueeze(-1) * m + entries.unsqueeze(-2)).reshape(-1))
            values.append(block.flatten(-2 if group.family.diagonal else -3))
        corner = scatter_sum(torch.cat(values, -1), torch.cat(places), m * m)
        product = torch.cat(products, -2)
        if not cones.is_sorted:
            product = product[..., cones.order.to(v.device), :]
        return product, corner.reshape(*v.shape[:-1], m, m)

    def entries(self, z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """The Jacobian at its :attr:`places`, ``(*batch, nnz)``: for few non-zeros among many."""
        cones, batch, n = self.structure.cones, z.shape[:-1], self.structure.size
        (up, across), v = self.structure.P, z[..., n:]
        below = (up != across).nonzero().squeeze(-1).to(P.device)
        diagonal = (torch.arange(z.shape[-1], device=v.device) >= n).to(v.dtype)
        parts = [P, P[..., below], A, -diagonal]
        for group, where in zip(cones.groups, self.structure.groups, strict=True):
            block = group.family.derivative(cones.taken(group, v))
            entry, cone, row = (index.to(v.device) for index in where)
            if group.family.diagonal:
                parts += [A[..., entry] * block[..., cone, 0], block.flatten(-2)]
            else:
                parts += [
                    (A[..., entry].unsqueeze(-1) * block[..., cone, row, :]).flatten(-2),
                    block.flatten(-3),
                ]
        joined = torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
        assert self.structure.order is not None
        assert self.structure.places is not None
        return scatter_sum(joined, self.structure.order, self.structure.places[0].numel())


def _is_recorded(*tensors: Tensor) -> bool:
    if _functorch.is_active() or _functorch.in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _dense(values: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    flat = scatter_sum(values, rows * shape[1] + cols, shape[0] * shape[1])
    return flat.reshape(*values.shape[:-1], *shape)
