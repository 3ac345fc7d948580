"""Plain vectors, beside unknowns that are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Size, Tensor

from invlayer_core.manifolds.manifold import Manifold

__all__ = ["Euclidean"]


@final
@dataclass(frozen=True)
class Euclidean(Manifold):
    """Real numbers without constraint: each is a point of its own, and tensors of any shape hold many.

    Examples
    --------
    >>> Euclidean().tangent_size
    1
    """

    shape = Size([])
    tangent_size = 1
    is_flat: ClassVar[bool] = True

    def retract(self, y: Tensor, delta: Tensor) -> Tensor:
        return y + delta.squeeze(-1)

    def local(self, y: Tensor, other: Tensor) -> Tensor:
        return (other - y).unsqueeze(-1)

    def scale(self, y: Tensor) -> Tensor:
        return y.unsqueeze(-1)
