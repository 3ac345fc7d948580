"""Solve, certificate and derivative as they are without ``torch.autocast``.

Autocast runs the linear layers of the conditions in bfloat16 or float16, whose rounding error, 1e-3 to
1e-2 of each term, is far above every tolerance here: no solver could reach it and no residual would mean
anything. And a backward pass usually runs outside the autocast region of its forward pass, so that the
derivative would be that of other conditions than those that were solved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["autocast_is_on", "without_autocast"]


def autocast_is_on() -> bool:
    """Whether autocast is on for any device."""
    return bool(torch._C._is_any_autocast_enabled())


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off for every device; what is opened inside works as ever."""
    on = [device for device in torch._C._autocast_supported_devices() if torch.is_autocast_enabled(device)]
    try:
        for device in on:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device in on:
            torch.set_autocast_enabled(device, True)
