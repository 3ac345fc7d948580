"""A bracketed Newton method, element by element on whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["find_root"]

_STEPS = 80
_ULP = 2.0**-52


def find_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, scale: float = 0.0
) -> Tensor:
    """The root of an increasing function between ``low`` and ``high``.

    Newton's method, with a halving wherever a step would leave what is left of the bracket, or would be
    no shorter than half the one before (Press et al. 2007, Numerical Recipes, 9.4).

    Parameters
    ----------
    function : callable
        ``x -> (value, slope)``.
    low, high : Tensor
    scale : float
        An element is done when its step is a few units in the last place of |x| + scale.
    """
    x, moved = 0.5 * (low + high), high - low
    done = torch.zeros_like(x, dtype=torch.bool)
    for step in range(_STEPS):
        value, slope = function(x)
        high, low = torch.where(value > 0, x, high), torch.where(value > 0, low, x)
        newton = x - value / slope
        shorter = (newton - x).abs() <= 0.5 * moved.abs()
        usable = (newton >= low) & (newton <= high) & shorter  # False for NaN
        new = torch.where(usable, newton, 0.5 * (low + high))
        new = torch.where(done | (value == 0), x, new)
        moved, x = new - x, new
        done = done | (moved.abs() <= 4 * _ULP * (x.abs() + scale))
        if step % 3 == 2 and x.device.type == "cpu" and bool(done.all()):
            break
    return x
