"""The power cones {(x, y, z) : xᵃ y¹⁻ᵃ ≥ |z|, x, y ≥ 0}, 0 < a < 1.

With r = |z| of the projection, stationarity gives x = ½ (w₁ + √(w₁² + 4 a r (|w₃| − r))), y likewise with
1 − a, and xᵃ y¹⁻ᵃ = r is one equation for r between 0 and |w₃| (Hien 2015, Differential properties of
Euclidean projection onto power cone, Math. Methods Oper. Res. 82).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.bracketed import find_root
from invlayer_core.conditions.cones.three import Boundary, Regions, ThreeDimensionalFamily

__all__ = ["PowerFamily"]

_LEAST = -150.0  # of log(δ / |w₃|): by then the boundary is flat to all digits


@final
@dataclass(frozen=True)
class PowerFamily(ThreeDimensionalFamily):
    """Power cones, each with its own exponent."""

    alphas: tuple[float, ...]
    name = "power"

    def _exponents(self, like: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.tensor(self.alphas, dtype=like.dtype, device=like.device)
        return a, 1.0 - a

    def regions(self, w: Tensor) -> Regions:
        a, b = self._exponents(w)
        x, y, z = w[..., 0], w[..., 1], w[..., 2].abs()
        inside = (x >= 0) & (y >= 0) & (_mean(x, y, a, b) >= z)
        polar = (x <= 0) & (y <= 0) & (_mean(-x / a, -y / b, a, b) >= z) & ~inside
        return Regions(inside, polar, (z == 0) & ~inside & ~polar)

    def on_face(self, w: Tensor) -> tuple[Tensor, Tensor]:
        positive = (w > 0) & torch.tensor([True, True, False], device=w.device)
        return torch.where(positive, w, torch.zeros_like(w)), positive.to(w.dtype)

    def on_boundary(self, w: Tensor) -> Tensor:
        a, b = self._exponents(w)
        x, y, z = w[..., 0], w[..., 1], w[..., 2].abs()
        equation = _Equation(x, y, z, a, b, torch.ones_like(z, dtype=torch.bool))
        middle, least = torch.full_like(z, math.log(0.5)), torch.full_like(z, _LEAST)
        equation = replace(equation, low=equation(middle)[0] > 0)
        delta = z * find_root(equation, least, middle, scale=1.0).exp()
        r = torch.where(equation.low, delta, z - delta)
        return torch.stack([*equation.coordinates(delta), torch.copysign(r, w[..., 2])], -1)

    def boundary(self, s: Tensor) -> Boundary:
        a, b = self._exponents(s)
        x, y, z = s.unbind(-1)
        length = (x * x + y * y).sqrt()
        # The gradient (−a y, −b x, x y / z) is that of |z| − xᵃ yᵇ, times x y / |z|.
        gradient = ((b * x * x - a * y * y) / length, -x * y / length, x * y / z)
        return Boundary((y / length, -x / length), gradient, a * b * length * length / (x * y))

    def example(self, like: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._exponents(like)
        k = a**a * b**b  # w = (0, 0, 1): r (1 − r) k² = r²
        r = k * k / (1.0 + k * k)
        spread = (r * (1.0 - r)).sqrt()
        point = torch.tensor([0.0, 0.0, 1.0], dtype=like.dtype, device=like.device)
        return point.expand(len(self.alphas), 3), torch.stack([a.sqrt() * spread, b.sqrt() * spread, r], -1)


def _mean(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """xᵃ yᵇ; NaN for negative x or y."""
    return x**a * y**b


@final
@dataclass(frozen=True)
class _Equation:
    """log r = a log x(r) + b log y(r) as an equation for log(δ / |w₃|).

    δ is r, or |w₃| − r where that is smaller: both keep their digits, and x and y are the same functions
    of either, as r enters them by r (|w₃| − r) alone.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    low: Tensor  # whether δ is r

    def coordinates(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        product = delta * (self.z - delta)
        return _coordinate(self.x, self.a * product), _coordinate(self.y, self.b * product)

    def __call__(self, log_delta: Tensor) -> tuple[Tensor, Tensor]:
        delta = self.z * log_delta.exp()
        p, q = self.coordinates(delta)
        r = torch.where(self.low, delta, self.z - delta)
        value = r.log() - self.a * p.log() - self.b * q.log()
        change = delta * (self.z - 2.0 * delta)
        slope = torch.where(self.low, 1.0, -delta / r) - change * (
            self.a**2 / (p * (2.0 * p - self.x)) + self.b**2 / (q * (2.0 * q - self.y))
        )
        return torch.where(self.low, value, -value), torch.where(self.low, slope, -slope)


def _coordinate(w: Tensor, product: Tensor) -> Tensor:
    """½ (w + √(w² + 4 product)), without cancellation; its derivative by the product is 1 / (2 x − w)."""
    root = (w * w + 4.0 * product).sqrt()
    return torch.where(w > 0, 0.5 * (w + root), 2.0 * product / (root - w))
