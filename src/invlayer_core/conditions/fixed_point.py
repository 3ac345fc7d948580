"""Fixed points: ``T(y, *args)`` = y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from invlayer_core.structured import subtract

__all__ = ["FixedPointConditions"]


@final
@dataclass(frozen=True)
class FixedPointConditions:
    """``F(y, *args)`` = ``T(y, *args)`` − y, leaf by leaf for a pytree of unknowns."""

    function: Callable[..., Any]

    def __call__(self, y: Any, *args: Any) -> Any:
        value = self.function(y, *args)
        if isinstance(y, Tensor) and isinstance(value, Tensor):
            return value - y
        return subtract("T", value, y)
