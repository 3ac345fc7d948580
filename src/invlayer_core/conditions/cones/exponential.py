"""The exponential cone, the closure of {(x, y, z) : y exp(x / y) ≤ z, y > 0}.

With ρ = x / y its boundary is the rays (ρ, 1, e^ρ), with normals (−1, ρ − 1, e^−ρ) in the dual cone. So
w = t (ρ, 1, e^ρ) − τ (−1, ρ − 1, e^−ρ); the first two equations give t and τ as functions of ρ, and the third
is one equation for ρ, increasing where t, τ > 0 (Friberg 2023, Projection onto the exponential cone: a
univariate root-finding problem, Optim. Methods Softw. 38).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.bracketed import find_root
from invlayer_core.conditions.cones.three import Boundary, Regions, ThreeDimensionalFamily

__all__ = ["ExponentialFamily"]

_DOUBLINGS = 10
_FAR = 1.4


@final
@dataclass(frozen=True)
class ExponentialFamily(ThreeDimensionalFamily):
    """Exponential cones."""

    name = "exponential"

    def regions(self, w: Tensor) -> Regions:
        x, y, z = w.unbind(-1)
        above = _log_at_most(y, x / y, z)  # y exp(x / y) ≤ z
        inside = ((y > 0) & above) | ((y == 0) & (x <= 0) & (z >= 0))
        below = _log_at_most(x, y / x - 1.0, -z)  # x exp(y / x) ≤ −e z
        polar = ((x > 0) & below) | ((x == 0) & (y <= 0) & (z <= 0))
        far = -_FAR * math.log(torch.finfo(w.dtype).eps)  # beyond it the boundary is flat to all digits
        flat = (x <= 0) & (y <= 0) | (x > 0) & (1.0 - y / x > far) | (y > 0) & (x / y < -far)
        return Regions(inside, polar & ~inside, flat & ~inside & ~polar)

    def on_face(self, w: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = w.unbind(-1)
        kept = torch.stack([x <= 0, y > 0, z > 0], -1)
        return torch.where(kept, w, torch.zeros_like(w)), kept.to(w.dtype)

    def on_boundary(self, w: Tensor) -> Tensor:
        equation = _ThirdEquation.of(*w.unbind(-1))
        delta = find_root(equation, torch.zeros_like(equation.width), equation.width)
        rho, t, _ = equation.multipliers(delta)
        return torch.stack([t * rho, t, t * rho.exp()], -1)

    def boundary(self, s: Tensor) -> Boundary:
        x, y, _ = s.unbind(-1)
        rho = x / y
        rising = rho > 0  # the gradient (e^ρ, (1 − ρ) e^ρ, −1), in a scale where nothing overflows
        small = torch.where(rising, -rho, rho).exp()
        one = torch.ones_like(small)
        first, last = torch.where(rising, one, small), torch.where(rising, small, one)
        length = (1.0 + rho * rho).sqrt()
        gradient = (first * (rho * rho - rho + 1.0) / length, first / length, -last)
        return Boundary((1.0 / length, -rho / length), gradient, first * length * length / y)

    def example(self, like: Tensor) -> tuple[Tensor, Tensor]:
        make = lambda *point: torch.tensor(point, dtype=like.dtype, device=like.device)  # noqa: E731
        return make(1.0, 2.0, 0.0), make(0.0, 1.0, 1.0)  # ρ = 0, t = τ = 1


def _log_at_most(factor: Tensor, exponent: Tensor, bound: Tensor) -> Tensor:
    """factor · exp(exponent) ≤ bound for factor > 0, without overflow."""
    return (bound > 0) & (factor.log() + exponent <= bound.log())


@final
@dataclass(frozen=True)
class _ThirdEquation:
    """t(ρ) e^ρ − τ(ρ) e^−ρ = z as an equation for δ, the distance of ρ from one end of where t, τ > 0.

    At the lower end 1 − y / x it is t that vanishes, at the upper end x / y it is τ: as δ x and δ y they
    keep their digits.

    Attributes
    ----------
    end, width : Tensor
        The end, and a bound for δ.
    up : Tensor of bool
        Whether ρ = end + δ; else ρ = end − δ.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    end: Tensor
    up: Tensor
    width: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, z: Tensor) -> _ThirdEquation:
        low = torch.where(x > 0, 1.0 - y / x, -torch.inf)
        high = torch.where(y > 0, x / y, torch.inf)
        bounded = (x > 0) & (y > 0)
        half = torch.where(bounded, 0.5 * (high - low), torch.ones_like(x))
        upper_half = cls(x, y, z, low, torch.ones_like(bounded), half)(half)[0] < 0
        up = (x > 0) & ~(bounded & upper_half)
        equation = cls(x, y, z, torch.where(up, low, high), up, half)
        for _ in range(_DOUBLINGS):
            short = ~bounded & (equation(equation.width)[0] < 0)
            if short.device.type == "cpu" and not bool(short.any()):
                break
            equation = replace(equation, width=torch.where(short, 2.0 * equation.width, equation.width))
        return equation

    def multipliers(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ρ, t and τ."""
        rho = torch.where(self.up, self.end + delta, self.end - delta)
        square = rho * (rho - 1.0) + 1.0
        t = torch.where(self.up, delta * self.x, (rho - 1.0) * self.x + self.y) / square
        tau = torch.where(self.up, self.x - rho * self.y, delta * self.y) / square
        return rho, t, tau

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        rho, t, tau = self.multipliers(delta)
        square, tilt = rho * (rho - 1.0) + 1.0, 2.0 * rho - 1.0
        grow, fall = rho.exp(), (-rho).exp()
        value = t * grow - tau * fall - self.z
        t_slope, tau_slope = (self.x - tilt * t) / square, (-self.y - tilt * tau) / square
        slope = (t_slope + t) * grow - (tau_slope - tau) * fall
        return torch.where(self.up, value, -value), slope
