"""The second-order cone {(t, u) : ‖u‖ ≤ t}, its own dual.

With r = ‖u‖ and û = u / r the projection of (t, u) is (t, u) inside, 0 inside the polar cone, and else
½ (1 + t / r) (r, u); its derivative there is ½ [[1, ûᵀ], [û, (1 + t/r) I − (t/r) û ûᵀ]]
(Fukushima, Luo & Tseng 2002, SIAM J. Optim. 12, 436).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.family import ConeFamily

__all__ = ["SecondOrderFamily"]


@final
@dataclass(frozen=True)
class SecondOrderFamily(ConeFamily):
    """Second-order cones of one size, in plain torch."""

    size: int

    def project_dual(self, v: Tensor) -> Tensor:
        t, u, r, inside, polar = _parts(v)
        scale = 0.5 * (1.0 + t / r)
        between = torch.cat([scale * r, scale * u], -1)
        return torch.where(inside, v, torch.where(polar, torch.zeros_like(v), between))

    def derivative(self, v: Tensor) -> Tensor:
        t, u, r, inside, polar = (part.unsqueeze(-1) for part in _parts(v))
        unit, ratio = u / r, t / r
        identity = torch.eye(self.size, dtype=v.dtype, device=v.device)
        core = (1.0 + ratio) * identity[1:, 1:] - ratio * unit * unit.mT
        top = torch.cat([torch.ones_like(ratio), unit.mT], -1)
        between = 0.5 * torch.cat([top, torch.cat([unit, core], -1)], -2)
        inner = torch.where(polar, torch.zeros_like(between), between)
        return torch.where(inside, identity.expand_as(between), inner)


def _parts(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t, u and r, with values between the cones put where v is in one of them: no NaN in derivatives."""
    t, u = v[..., :1], v[..., 1:]
    size = torch.linalg.vector_norm(u.detach(), dim=-1, keepdim=True)
    inside, polar = size <= t.detach(), size <= -t.detach()
    decided = inside | polar
    t = torch.where(decided, torch.zeros_like(t), t)
    if u.shape[-1] == 0:
        return t, u, torch.ones_like(t), inside, polar
    u = torch.where(decided, torch.ones_like(u), u)
    return t, u, torch.linalg.vector_norm(u, dim=-1, keepdim=True), inside, polar
