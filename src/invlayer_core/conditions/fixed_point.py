"""Fixed points: ``T(y, *args)`` = y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

__all__ = ["FixedPointConditions"]


@final
@dataclass(frozen=True)
class FixedPointConditions:
    """``F(y, *args)`` = ``T(y, *args)`` − y."""

    function: Callable[..., Tensor]

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        return self.function(y, *args) - y
