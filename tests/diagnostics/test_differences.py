"""Noise estimates and steps against functions whose noise and derivatives are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invlayer_core.diagnostics.differences import take_differences
from invlayer_core.diagnostics.noise import estimate_noise

EPS = torch.finfo(torch.float64).eps


def noisy(size: float) -> Callable[[float], Tensor]:
    """exp(2t) (1 + noise) and sin(t) + 1 + noise, uniform, of standard deviation ``size``."""
    generator = torch.Generator().manual_seed(1)

    def evaluate(t: float) -> Tensor:
        jitter = size * 12**0.5 * (torch.rand(2, generator=generator, dtype=torch.float64) - 0.5)
        return torch.tensor([math.exp(2 * t), math.sin(t) + 1], dtype=torch.float64) + jitter

    return evaluate


SLOPES = torch.tensor([2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-6, 1e-3])
def test_the_noise_is_found_within_a_factor_of_four(size: float):
    found = estimate_noise(noisy(size), EPS)
    assert found.agreed
    pooled = float(found.deviation.square().mean().sqrt())
    assert size / 4 < pooled < 4 * size


def test_a_smooth_function_has_rounding_noise_alone():
    found = estimate_noise(noisy(0.0), EPS)
    assert float(found.deviation.max()) < 4 * EPS


def test_a_constant_has_the_noise_of_one_rounding():
    found = estimate_noise(lambda t: torch.ones(2, dtype=torch.float64), EPS)
    assert found.deviation.tolist() == [0.3 * EPS] * 2


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-9, 1e-6, 1e-3])
def test_differences_are_right_within_their_own_uncertainty(size: float):
    found = take_differences(noisy(size), EPS)
    error = (found.slopes[found.chosen] - SLOPES).abs()
    # The attainable error is a few σ^(2/3); the uncertainty must cover it, and not by much more.
    attainable = max(size, EPS) ** (2 / 3)
    assert bool((error <= 2 * found.uncertainty + 4 * EPS).all())
    assert float(found.uncertainty.max()) < 50 * attainable


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-6])
def test_the_step_grows_with_the_cube_root_of_the_noise(size: float):
    ratio = take_differences(noisy(1e3 * size), EPS).predicted / take_differences(noisy(size), EPS).predicted
    assert 3 < ratio < 30


def test_where_the_function_raises_there_is_no_slope_and_others_are_taken():
    def evaluate(t: float) -> Tensor:
        if abs(t) > 1e-4:
            raise RuntimeError("out of the domain")
        return torch.tensor([math.exp(2 * t), math.sin(t) + 1], dtype=torch.float64)

    found = take_differences(evaluate, EPS)
    assert found.failures > 0
    assert found.usable
    assert bool(((found.slopes[found.chosen] - SLOPES).abs() < 1e-8).all())


def test_where_it_raises_everywhere_nothing_is_usable():
    def evaluate(t: float) -> Tensor:
        if t:
            raise RuntimeError("an isolated point")
        return torch.ones(2, dtype=torch.float64)

    assert not take_differences(evaluate, EPS).usable
