"""The functions of an angle that Lie groups are made of, exact near zero with derivatives of every order.

Each is a smooth function of s = θ², written with √s in its closed form, which has no derivative at 0 and
cancels near it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invlayer_core.smooth import SmoothAtZero, polynomial

__all__ = ["chord", "cubic_remainder", "half_cosine", "half_sine", "rotation_angle_ratio"]

_TERMS = 10


half_sine = SmoothAtZero(
    tuple((-1) ** k * 0.5 ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(_TERMS)),
    lambda s: torch.sin(s.sqrt() / 2) / s.sqrt(),
)
"""sin(θ/2) / θ."""

half_cosine = SmoothAtZero(
    tuple((-1) ** k * 0.25**k / math.factorial(2 * k) for k in range(_TERMS)),
    lambda s: torch.cos(s.sqrt() / 2),
)
"""cos(θ/2)."""

cubic_remainder = SmoothAtZero(
    tuple((-1) ** k / math.factorial(2 * k + 3) for k in range(_TERMS)),
    lambda s: (1 - torch.sin(s.sqrt()) / s.sqrt()) / s,
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

chord = SmoothAtZero(
    _BERNOULLI,
    lambda s: (1 - 0.5 * s.sqrt() / torch.tan(0.5 * s.sqrt())) / s,
)
"""(1 − (θ/2) cot(θ/2)) / θ², smooth for |θ| < 2π."""

_ARCTANGENT = tuple(2 * (-1) ** k / (2 * k + 1) for k in range(20))
_NEAR_TANGENT = 0.1  # the series of the arctangent has radius 1


def rotation_angle_ratio(squared_sine: Tensor, cosine: Tensor) -> Tensor:
    """θ / sin(θ/2) from sin²(θ/2) and cos(θ/2) ≥ 0, both up to one common factor (squared in the first)."""
    near = squared_sine < _NEAR_TANGENT * cosine.square()
    base = torch.where(near, cosine, 1.0)
    series = polynomial(_ARCTANGENT, torch.where(near, squared_sine, 0.0) / base.square()) / base
    sine = torch.where(near, 1.0, squared_sine).sqrt()
    return torch.where(near, series, 2 * torch.atan2(sine, cosine) / sine)
