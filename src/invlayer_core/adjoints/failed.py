"""Keep failed samples from spoiling the derivatives of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invlayer_core.conditions.system import System

__all__ = ["answer_for_failed", "out_of_harm"]


def answer_for_failed(rhs: Tensor, value: float) -> Tensor:
    """``value`` for a failed sample, or zero where nothing is asked of it."""
    return torch.where(rhs == 0, torch.zeros_like(rhs), torch.full_like(rhs, value))


def out_of_harm(
    system: System, y: Tensor, dead: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Where F can be linearised without NaN from failed samples reaching shared parameters.

    A failed sample gets the y of a good one, and what is not finite in θ becomes 1: only failed samples
    can depend on it. Their rows are then multiplied by zero, and 0 · finite = 0.
    """
    rows = y.reshape(system.shape.count, -1)
    good = torch.argmin(dead.reshape(-1).to(torch.uint8))
    donor = torch.index_select(rows, 0, good.reshape(1))
    donor = torch.where(donor.isfinite(), donor, torch.zeros_like(donor))
    safe = torch.where(dead.reshape(-1, 1), donor, rows).reshape(y.shape)
    return safe, [
        torch.where(t.isfinite(), t, torch.ones_like(t)) if t.is_floating_point() else t for t in theta
    ]
