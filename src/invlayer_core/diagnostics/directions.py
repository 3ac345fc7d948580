"""Fixed directions and cotangents: seeded by themselves, so that no global generator is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "Directions"]

DIRECTIONS = 3
_SEED = 20110
_SMALLEST = 0.1  # of a tensor's root mean square: no entry is moved by less


@final
@dataclass(frozen=True)
class Directions:
    """Directions in the inputs, scaled so that a step t changes every entry by about the fraction t.

    Attributes
    ----------
    tangents : tuple of lists of Tensor
        One list per direction, shaped like the inputs.
    cotangents : tuple of Tensor
        One vector per direction, as long as the flat output.
    """

    tangents: tuple[list[Tensor], ...]
    cotangents: tuple[Tensor, ...]

    @classmethod
    def draw(cls, inputs: Sequence[Tensor], size: int) -> Directions:
        """Directions for these inputs, and cotangents for an output of ``size`` entries."""
        generator = torch.Generator().manual_seed(_SEED)
        tangents = tuple([_direction(value, generator) for value in inputs] for _ in range(DIRECTIONS))
        return cls(tangents, tuple(_signed((size,), generator) for _ in range(DIRECTIONS)))


def _signed(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Entries of size ½ to 1 and of either sign: none can hide an entry of a gradient."""
    size = 0.5 + 0.5 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(*shape, generator=generator, dtype=torch.float64) < 0.5, -size, size)


def _direction(value: Tensor, generator: torch.Generator) -> Tensor:
    host = value.to("cpu", torch.float64)
    typical = host.square().mean().sqrt() if host.numel() else host.sum()
    typical = torch.where(typical > 0, typical, 1.0)
    scale = torch.maximum(host.abs(), _SMALLEST * typical)
    return (scale * _signed(tuple(value.shape), generator)).to(value)
