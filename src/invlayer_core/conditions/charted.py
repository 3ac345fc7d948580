"""Functions of unknowns on manifolds, as functions of their coordinates in a chart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from invlayer_core.manifolds.atlas import Atlas

__all__ = ["Charted", "ChartedJacobian"]


@final
@dataclass(frozen=True)
class Charted:
    """The user's ``f(y, *args)`` as ``(z, base, *args)``: y is the point at z in the chart at ``base``."""

    function: Callable[..., Any]
    atlas: Atlas

    def __call__(self, z: Tensor, base: Tensor, *args: Any) -> Any:
        return self.function(self.atlas.structure.unpack(self.atlas.point(base, z)), *args)


@final
@dataclass(frozen=True)
class ChartedJacobian:
    """The user's ``∂r/∂δ (y, *args)`` at δ = 0 in the chart at y, as ``∂r/∂z (z, base, *args)``."""

    jacobian: Callable[..., Tensor]
    atlas: Atlas

    @property
    def function(self) -> Any:
        """The user's own, for messages."""
        return self.jacobian

    def __call__(self, z: Tensor, base: Tensor, *args: Any) -> Tensor:
        own = self.jacobian(self.atlas.structure.unpack(self.atlas.point(base, z)), *args)
        return own @ self.atlas.change_of_chart(base, z)
