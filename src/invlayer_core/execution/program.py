"""The forward of a constrained problem: any solver finds y, and its multipliers are found beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.conditions.kkt import ConstraintLayout, Multipliers
from invlayer_core.conditions.system import System
from invlayer_core.execution.forward import AroundForward, Forward
from invlayer_core.execution.multipliers import estimate_multipliers
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.registered import mapped_system
from invlayer_core.execution.workload import Derivatives

__all__ = ["ProgramForward"]


@final
@dataclass(frozen=True)
class ProgramForward(AroundForward):
    """z = (y, multipliers), of a forward that finds y; tensors are the inner forward's, then θ.

    Attributes
    ----------
    inner : Forward
    count : int
        How many of the tensors are the inner forward's.
    rows : System
        The gradient of the Lagrangian and the constraints, as functions of z.
    layout : ConstraintLayout
    derivatives : Derivatives
    """

    inner: Forward
    count: int
    rows: System
    layout: ConstraintLayout
    derivatives: Derivatives

    @property
    def event_dims(self) -> int:  # type: ignore[override]
        return 1

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        y, outcome = self.inner.run(tensors[: self.count])
        flat = y.reshape(-1, self.layout.unknowns)
        multipliers = _given(outcome.aux, self.layout, flat)
        if multipliers is None:
            multipliers = self._estimated(flat, tensors[self.count :])
        z = torch.cat([flat, multipliers], -1)
        return z.reshape(*y.shape[:-1], self.layout.size), replace(outcome, y=z)

    def _estimated(self, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """The multipliers at y ``(B, n)``; NaN where y is."""
        n, finite = self.layout.unknowns, y.isfinite().all(-1, keepdim=True)
        safe = torch.where(finite, y, torch.zeros_like(y))
        point = torch.cat([safe, y.new_zeros(y.shape[0], self.layout.constraints)], -1)
        shaped = point.reshape(self.rows.shape.full)
        rows, blocks = self.derivatives.linearized(self.rows, shaped, theta, False)
        values = rows.reshape(point.shape)
        multipliers = estimate_multipliers(
            values[:, :n], blocks[:, n:, :n], values[:, n:], safe, self.layout.equalities
        )
        return torch.where(finite, multipliers, torch.nan)

    def mapped(self, size: int, dims: Sequence[int | None]) -> ProgramForward:
        return replace(
            self,
            inner=self.inner.mapped(size, dims[: self.count]),
            rows=mapped_system(self.rows, size, dims[self.count :]),
        )

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        inner = self.inner.moved(tensors[: self.count], dims[: self.count], size)
        return (*inner, *tensors[self.count :])


def _given(aux: Sequence[Any], layout: ConstraintLayout, like: Tensor) -> Tensor | None:
    """The multipliers that the solver itself returned, ``(B, k)``; None unless it did for every sample."""
    found = [sample.get("multipliers") if isinstance(sample, Mapping) else None for sample in aux]
    rows = [row for row in found if isinstance(row, Mapping)]
    if not rows or len(rows) != like.shape[0]:
        return None
    sizes = (layout.equalities, layout.inequalities, layout.lower, layout.upper)
    parts = []
    for name, size in zip(Multipliers._fields, sizes, strict=True):
        values = [torch.as_tensor(row.get(name, ()), dtype=like.dtype).reshape(-1) for row in rows]
        if size and any(value.shape != (size,) for value in values):
            return None
        parts.append(torch.stack(values) if size else torch.zeros(len(rows), 0, dtype=like.dtype))
    return torch.cat(parts, -1).to(like.device)
