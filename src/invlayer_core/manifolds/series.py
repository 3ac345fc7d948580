"""The functions of an angle that Lie groups are made of, exact near zero with derivatives of every order.

Each is a smooth function of s = θ², written with √s in its closed form, which has no derivative at 0 and
cancels near it. There the power series stands for it, in s, up to 1/2; with so many terms that value and
derivatives are exact to rounding. Both branches are evaluated, each at a point where it is harmless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["chord", "cubic_remainder", "half_cosine", "half_sine", "rotation_angle_ratio"]

_NEAR = 0.5
_TERMS = 10


def _polynomial(coefficients: Sequence[float], s: Tensor) -> Tensor:
    """Σ cₖ sᵏ by Horner's rule."""
    value = torch.full_like(s, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * s + coefficient
    return value


@final
@dataclass(frozen=True)
class _SmoothOfSquare:
    """A function of s = θ² by its power series near 0, and by its closed form in θ elsewhere."""

    coefficients: tuple[float, ...]
    closed: Callable[[Tensor], Tensor]

    def __call__(self, s: Tensor) -> Tensor:
        near = s < _NEAR
        series = _polynomial(self.coefficients, torch.where(near, s, 0.0))
        return torch.where(near, series, self.closed(torch.where(near, 1.0, s).sqrt()))


half_sine = _SmoothOfSquare(
    tuple((-1) ** k * 0.5 ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(_TERMS)),
    lambda angle: torch.sin(angle / 2) / angle,
)
"""sin(θ/2) / θ."""

half_cosine = _SmoothOfSquare(
    tuple((-1) ** k * 0.25**k / math.factorial(2 * k) for k in range(_TERMS)),
    lambda angle: torch.cos(angle / 2),
)
"""cos(θ/2)."""

cubic_remainder = _SmoothOfSquare(
    tuple((-1) ** k / math.factorial(2 * k + 3) for k in range(_TERMS)),
    lambda angle: (angle - torch.sin(angle)) / angle**3,
)
"""(θ − sin θ) / θ³."""

# |B₂ₖ| / (2k)!, k = 1, 2, ...: x cot x = 1 − Σ 4ᵏ |B₂ₖ| / (2k)! x²ᵏ.
_BERNOULLI = (
    1 / 12,
    1 / 720,
    1 / 30240,
    1 / 1209600,
    1 / 47900160,
    691 / 1307674368000,
    1 / 74724249600,
    3617 / 10670622842880000,
    43867 / 5109094217170944000,
    174611 / 802857662698291200000,
)

chord = _SmoothOfSquare(
    _BERNOULLI,
    lambda angle: (1 - 0.5 * angle / torch.tan(0.5 * angle)) / angle.square(),
)
"""(1 − (θ/2) cot(θ/2)) / θ², smooth for |θ| < 2π."""

_ARCTANGENT = tuple(2 * (-1) ** k / (2 * k + 1) for k in range(20))
_NEAR_TANGENT = 0.1  # the series of the arctangent has radius 1


def rotation_angle_ratio(squared_sine: Tensor, cosine: Tensor) -> Tensor:
    """θ / sin(θ/2) from sin²(θ/2) and cos(θ/2) ≥ 0, both up to one common factor (squared in the first)."""
    near = squared_sine < _NEAR_TANGENT * cosine.square()
    base = torch.where(near, cosine, 1.0)
    series = _polynomial(_ARCTANGENT, torch.where(near, squared_sine, 0.0) / base.square()) / base
    sine = torch.where(near, 1.0, squared_sine).sqrt()
    return torch.where(near, series, 2 * torch.atan2(sine, cosine) / sine)
