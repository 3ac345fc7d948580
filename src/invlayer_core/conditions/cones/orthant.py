"""The two polyhedral cones: {0}, for equations, and the non-negative half-line, for inequalities."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.family import ConeFamily

__all__ = ["NonnegativeFamily", "ZeroFamily"]


@final
class ZeroFamily(ConeFamily):
    """K = {0}; its dual is the whole line."""

    size = 1
    diagonal = True

    def project_dual(self, v: Tensor) -> Tensor:
        return v

    def derivative(self, v: Tensor) -> Tensor:
        return torch.ones_like(v)


@final
class NonnegativeFamily(ConeFamily):
    """K = {s ≥ 0}, its own dual."""

    size = 1
    diagonal = True

    def project_dual(self, v: Tensor) -> Tensor:
        return torch.where(v > 0, v, torch.zeros_like(v))

    def derivative(self, v: Tensor) -> Tensor:
        return (v > 0).to(v.dtype)
