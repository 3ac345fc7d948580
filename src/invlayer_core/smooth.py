"""Functions that are smooth at 0 although their closed form is not: sin(√s)/√s, log(1 + u)/u, ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["SmoothAtZero", "polynomial"]


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Σ cₖ xᵏ by Horner's rule."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


@final
@dataclass(frozen=True)
class SmoothAtZero:
    """A function of x ≥ 0: its power series below ``near``, its closed form above.

    With enough terms, value and derivatives of every order are exact to rounding on both sides. Both are
    evaluated, each where it is harmless: a derivative of what ``where`` leaves out must not be NaN.

    Parameters
    ----------
    coefficients : tuple of float
        c₀, c₁, ...
    closed : callable
        Called with x ≥ ``near``.
    near : float
        Well inside the radius of convergence.
    """

    coefficients: tuple[float, ...]
    closed: Callable[[Tensor], Tensor]
    near: float = 0.5

    def __call__(self, x: Tensor) -> Tensor:
        near = x < self.near
        series = polynomial(self.coefficients, torch.where(near, x, 0.0))
        return torch.where(near, series, self.closed(torch.where(near, 1.0, x)))
