"""Root finding: ``F(y, *args)`` = 0."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["root_conditions"]


def root_conditions(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """F itself."""
    return function
