"""Central differences whose step is matched to the noise of the function, with an error estimate.

D(h) = (φ(h) − φ(−h)) / 2h has the error |φ‴| h²/6 + σ/(√2 h): least at h = (3σ / |φ‴|)^(1/3) up to a constant
near one (Gill, Murray, Saunders & Wright, *Computing forward-difference intervals*, 1983; Moré & Wild,
*Estimating derivatives of noisy simulations*, 2012). As both σ and φ‴ are estimates, D is taken at steps
around it; the one that agrees best with its neighbours is chosen, and that agreement is its uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core.diagnostics.noise import Noise, estimate_noise

__all__ = ["Differences", "take_differences"]

_RATIO = 10**0.5
_BELOW, _ABOVE = 5, 3  # steps on either side of the predicted one
_LARGEST = 0.3


@final
@dataclass(frozen=True)
class Differences:
    """Central differences of one function along one direction.

    Attributes
    ----------
    steps : Tensor of shape ``(K,)``
        Increasing.
    slopes : Tensor of shape ``(K, N)``
        D(h); NaN where the function could not be evaluated.
    noise : Noise
    value : Tensor of shape ``(N,)``
        φ(0).
    predicted : float
        The step that noise and third derivative ask for.
    failures : int
        Evaluations that raised.
    """

    steps: Tensor
    slopes: Tensor
    noise: Noise
    value: Tensor
    predicted: float
    failures: int

    def along(self, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """⟨cotangent, D(h)⟩ for every step; where its noise lies; and its size, free of cancellation."""
        series = self.slopes @ cotangent
        deviation = (self.noise.deviation * cotangent).square().sum().sqrt()
        best = self.slopes[self.chosen]
        size = (best * cotangent).norm() + _rounding_size(self.value * cotangent) + 1e-300
        return series, deviation / (2**0.5 * self.steps), size

    def scalar(self, cotangent: Tensor) -> tuple[float, float, float]:
        """⟨cotangent, D⟩ at the chosen step, its relative uncertainty, and its size."""
        series, floor, size = self.along(cotangent)
        k = self.chosen
        near = series[max(k - 1, 0) : k + 2]
        gap = float((near - series[k]).abs().nan_to_num(0.0).max())
        return float(series[k]), max(gap, float(floor[k])) / float(size), float(size)

    @property
    def chosen(self) -> int:
        """The step whose slope agrees best with its neighbours, noise counted in."""
        size = self.slopes.nan_to_num().abs().median(0).values + _rounding_size(self.value)
        disagreement = ((neighbour_gap(self.slopes)) / size.clamp_min(1e-300)).square().mean(-1).sqrt()
        floor = (self.noise.deviation / size.clamp_min(1e-300)).square().mean().sqrt() / (2**0.5 * self.steps)
        return int((disagreement + floor).nan_to_num(torch.inf, torch.inf).argmin())

    @property
    def usable(self) -> bool:
        """Whether there is a slope at all."""
        return bool(self.slopes[self.chosen].isfinite().all())

    @property
    def uncertainty(self) -> Tensor:
        """Of every entry of the chosen slope."""
        k = self.chosen
        return torch.maximum(
            neighbour_gap(self.slopes)[k].nan_to_num(), self.noise.deviation / (2**0.5 * self.steps[k])
        )


def neighbour_gap(slopes: Tensor) -> Tensor:
    """How much each row differs from the one before and the one after; NaN counts as no neighbour."""
    gap = slopes.diff(dim=0).abs()
    edge = torch.full_like(slopes[:1], torch.nan)
    before, after = torch.cat([edge, gap]), torch.cat([gap, edge])
    gap = torch.fmax(before, after)
    return torch.where(slopes.isfinite(), gap.nan_to_num(torch.inf), torch.nan)


def _rounding_size(values: Tensor) -> Tensor:
    """What counts as a slope of zero, beside values of this size."""
    return 1e-8 * values.norm()


def take_differences(evaluate: Callable[[float], Tensor], eps: float) -> Differences:
    """Central differences of ``evaluate(t)`` at t = 0.

    Parameters
    ----------
    evaluate : callable
        ``float -> (N,)``; where it raises, the slope is NaN.
    eps : float
        Unit of the precision that it is computed in.
    """
    value = evaluate(0.0)
    guarded = _Guarded(evaluate, torch.full_like(value, torch.nan))
    noise = estimate_noise(guarded, eps)
    noise = Noise(noise.deviation.nan_to_num(torch.inf), noise.agreed)
    predicted = _predict(guarded, value, noise.deviation, eps)
    powers = torch.arange(-_BELOW, _ABOVE + 1, dtype=torch.float64)
    steps = predicted * _RATIO**powers
    steps = steps[steps <= _LARGEST]
    slopes = torch.stack([(guarded(h) - guarded(-h)) / (2 * h) for h in steps.tolist()])
    return Differences(steps, slopes, noise, value, predicted, guarded.failures)


@final
class _Guarded:
    """A function that gives NaN where the given one raises."""

    def __init__(self, evaluate: Callable[[float], Tensor], nothing: Tensor) -> None:
        self.evaluate, self.nothing, self.failures = evaluate, nothing, 0

    def __call__(self, step: float) -> Tensor:
        try:
            return self.evaluate(step)
        except Exception:  # the solver may fail, or leave its domain, beside a point at which it does not
            self.failures += 1
            return self.nothing


def _predict(evaluate: Callable[[float], Tensor], value: Tensor, deviation: Tensor, eps: float) -> float:
    """(3σ / |φ‴|)^(1/3), both in units of the values; φ‴ from a difference over a wider step."""
    size = torch.maximum(value.abs(), 1e-3 * value.abs().max()).clamp_min(1e-300)
    noise = max(float((deviation / size).square().mean().sqrt()), 0.3 * eps)
    wide = min(max(noise ** (1 / 5), 1e-3), 0.1)
    third = evaluate(2 * wide) - 2 * evaluate(wide) + 2 * evaluate(-wide) - evaluate(-2 * wide)
    bend = float((third / (2 * wide**3) / size).square().mean().sqrt())
    if not math.isfinite(noise + bend):
        return eps ** (1 / 3)
    bend = max(bend, 1e-3)  # a straight line would ask for an endless step
    return float(min(max((3 * noise / bend) ** (1 / 3), eps ** (2 / 3)), 0.05))
