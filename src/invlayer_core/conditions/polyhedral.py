"""Cone programs without a curved cone: quadratic programs, written as those are.

With K = {0}ᶻ × R₊ˡ the cone program minimise ½ xᵀP x + qᵀx subject to C x + s = d, s ∈ K is

    minimise ½ xᵀPx + qᵀx  subject to  A x = b,  G x ≤ h,

A and b the first z rows of C and d, G and h the others. Its multipliers are the dual variable y, and s is
what is left of the limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.cone import ConeSolution, scatter_sum
from invlayer_core.conditions.cones.structure import ConeStructure
from invlayer_core.conditions.quadratic import QuadraticLayout
from invlayer_core.matrices import DenseForm

__all__ = ["PolyhedralForm"]


@final
@dataclass(frozen=True, eq=False)
class PolyhedralForm:
    """The quadratic programs that the cone programs of a structure are.

    Parameters
    ----------
    structure : ConeStructure
        Of polyhedral cones.

    Attributes
    ----------
    layout : QuadraticLayout
        Of the same programs as quadratic ones, with dense matrices.
    """

    structure: ConeStructure
    layout: QuadraticLayout = field(init=False)

    def __post_init__(self) -> None:
        n, cones = self.structure.size, self.structure.cones
        forms = {"P": DenseForm(n, n)} if self.structure.P[0].numel() else {}
        forms |= {"G": DenseForm(cones.nonneg, n)} if cones.nonneg else {}
        forms |= {"A": DenseForm(cones.zero, n)} if cones.zero else {}
        limits = {"P": (), "q": ("q",), "G": ("h",), "A": ("b",)}
        names = [part for name, beside in limits.items() for part in (name, *beside)]
        kept = {"q", *forms, *(limits[name][0] for name in forms if limits[name])}
        object.__setattr__(self, "layout", QuadraticLayout(n, tuple(n for n in names if n in kept), forms))

    def arguments(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The arguments of the quadratic programs, in the order of the layout; differentiable."""
        zero = self.structure.cones.zero
        found = {"q": q, "b": b[..., :zero], "h": b[..., zero:]}
        if "P" in self.layout.forms:  # of a matrix that is not symmetric, its symmetric part is meant
            twice = 1.0 + (self.structure.P[0] != self.structure.P[1]).to(P)
            found["P"] = self._dense(P * twice, *self.structure.P, self.structure.size)
        rows = self._dense(A, *self.structure.A, self.structure.equations)
        found |= {"A": rows[..., :zero, :], "G": rows[..., zero:, :]}
        return tuple(found[name] for name in self.layout.names)

    def _dense(self, values: Tensor, rows: Tensor, cols: Tensor, height: int) -> Tensor:
        width = self.structure.size
        flat = scatter_sum(values, rows * width + cols, height * width)
        return flat.unflatten(-1, (height, width))

    def unknowns(self, z: Tensor) -> Tensor:
        """(x, y) for z = (x, v): with v = y − s, y is the positive part of v, and v where s is zero."""
        n = self.structure.size
        return torch.cat([z[..., :n], self.structure.cones.project_dual(z[..., n:])], -1)

    def solution(self, z: Tensor, theta: tuple[Tensor, ...], dead: Tensor | None) -> ConeSolution:
        """x, y and s for (x, y), differentiable; s is zero where y is not.

        ``dead`` are the samples ``(*batch,)`` that have no derivative: their s has that of y, which is
        marked so.
        """
        x, y = z[..., : self.structure.size], z[..., self.structure.size :]
        program, held = self.layout.program(theta), x
        if dead is not None:
            held = torch.where(dead.unsqueeze(-1), torch.zeros_like(x), x)
        slack = program.limits(x) - program.constraints(held)
        binding = (y.detach() > 0) | (torch.arange(y.shape[-1], device=y.device) < self.structure.cones.zero)
        slack = torch.where(binding, torch.zeros_like(slack), slack)
        if dead is not None:
            known = program.limits(x.detach()) - program.constraints(x.detach())
            slack = torch.where(dead.unsqueeze(-1), known.detach() + (y - y.detach()), slack)
        return ConeSolution(x, y, slack)
