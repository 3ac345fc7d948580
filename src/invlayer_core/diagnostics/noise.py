"""How noisy a computed function is: the difference table of Moré & Wild.

A smooth function's k-th differences over m + 1 equally spaced points vanish like δᵏ; what is left is
noise. With γ_k = (k!)² / (2k)!, the level σ_k² = γ_k · mean((Δᵏf)²) estimates its variance, and is right
where three consecutive levels agree and the differences change sign (J. J. Moré & S. M. Wild,
*Estimating computational noise*, SIAM J. Sci. Comput. 33, 2011, algorithm ECnoise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

__all__ = ["Noise", "estimate_noise"]

_POINTS = 7
_AGREE = 4.0
_ATTEMPTS = 3
_RESCALE = 100.0


@final
class Noise(NamedTuple):
    """The standard deviation of every entry, and whether the levels agreed on it (else it is a bound)."""

    deviation: Tensor
    agreed: bool


def estimate_noise(evaluate: Callable[[float], Tensor], eps: float) -> Noise:
    """The noise of ``evaluate(t)`` near t = 0.

    Parameters
    ----------
    evaluate : callable
        A smooth function of t, computed with noise: ``float -> (N,)``.
    eps : float
        Unit of the precision that it is computed in; the least noise there can be.
    """
    spacing, best = eps ** (2 / 3), None
    for _ in range(_ATTEMPTS):
        values = torch.stack([evaluate((i - _POINTS // 2) * spacing) for i in range(_POINTS)])
        found = _read_table(values)
        best = found if best is None or (found.agreed and not best.agreed) else best
        if found.agreed:
            break
        flat = (values.diff(dim=0) == 0).double().mean() > 0.5
        spacing = spacing * _RESCALE if flat else spacing / _RESCALE
    assert best is not None
    return Noise(torch.maximum(best.deviation, 0.3 * eps * values.abs().amax(0)), best.agreed)


def _read_table(values: Tensor) -> Noise:
    scale = _scale(values)
    levels, pooled, turning = [], [], []
    differences = values
    for k in range(1, _POINTS):
        differences = differences.diff(dim=0)
        gamma = math.factorial(k) ** 2 / math.factorial(2 * k)
        levels.append((gamma * differences.square().mean(0)).sqrt())
        pooled.append(float((levels[-1] / scale).square().mean().sqrt()))
        turning.append(bool((differences.amin(0) < 0).logical_and(differences.amax(0) > 0).any()))
    for k in range(len(levels) - 2):
        three = pooled[k : k + 3]
        if turning[k] and max(three) <= _AGREE * min(three):
            return Noise(levels[k], agreed=True)
    return Noise(levels[-1], agreed=False)


def _scale(values: Tensor) -> Tensor:
    size = values.abs().amax(0)
    return torch.maximum(size, 1e-3 * size.max()).clamp_min(torch.finfo(values.dtype).tiny)
