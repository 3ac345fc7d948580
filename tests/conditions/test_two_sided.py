"""Two-sided complementarity: the natural residual, its derivative, its weights, its soft form."""

import math

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.conditions.kkt import complementarity

F64 = torch.float64
INF = math.inf

# c, μ, lower, upper: above, below, between, unbounded above, below, on either side, an equation
CASES = [
    (1.0, 0.3, -1.0, 1.0),
    (1.5, 0.2, -1.0, 1.0),
    (-1.0, -0.4, -1.0, 1.0),
    (0.2, 1e-9, -1.0, 1.0),
    (0.2, -1e-9, -1.0, 1.0),
    (0.2, 0.5, -1.0, INF),
    (0.2, -0.5, -INF, 1.0),
    (0.2, 0.1, -INF, INF),
    (0.7, 0.0, 0.7, 0.7),
    (0.6, -3.0, 0.7, 0.7),
]
VALUE, MULTIPLIER, LOWER, UPPER = (torch.tensor(column, dtype=F64) for column in zip(*CASES, strict=True))
SCALE = torch.tensor([2.0], dtype=F64)


def rows(value: Tensor, multiplier: Tensor, lower: Tensor, upper: Tensor, activity: str) -> Tensor:
    return inv.constraints.two_sided_complementarity(value, multiplier, SCALE, lower, upper, activity)


@pytest.mark.parametrize("activity", ["exact", "soft"])
def test_it_is_the_natural_residual(activity: str) -> None:
    expected = VALUE - (VALUE + SCALE * MULTIPLIER).clamp(LOWER, UPPER)
    expected = torch.where(LOWER == UPPER, VALUE - UPPER, expected)
    ours = rows(VALUE, MULTIPLIER, LOWER, UPPER, activity)
    torch.testing.assert_close(ours, expected, rtol=1e-15, atol=1e-16)
    assert rows(VALUE * math.nan, MULTIPLIER, LOWER, UPPER, activity).isnan().all()


@pytest.mark.parametrize("activity", ["exact", "soft"])
def test_the_weights_are_its_derivative(activity: str) -> None:
    inputs = [t.clone().requires_grad_() for t in (VALUE, MULTIPLIER, LOWER, UPPER)]
    by_value, by_multiplier, by_lower, by_upper = torch.autograd.grad(rows(*inputs, activity).sum(), inputs)
    weights = inv.constraints.two_sided_weights(VALUE, MULTIPLIER, SCALE, LOWER, UPPER, activity)
    torch.testing.assert_close(by_value, weights, rtol=1e-15, atol=0)
    torch.testing.assert_close(by_multiplier, (weights - 1) * SCALE, rtol=1e-15, atol=0)
    torch.testing.assert_close(by_lower + by_upper, -weights, rtol=1e-15, atol=0)
    exact = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 1, 1], dtype=F64)
    if activity == "exact":
        assert torch.equal(weights, exact)
    else:
        assert ((weights[[3, 4]] > 0) & (weights[[3, 4]] < 1e-8)).all()


def test_one_bound_is_the_one_sided_form() -> None:
    slack, multiplier = torch.rand(2, 20, dtype=F64)
    for activity in ("exact", "soft"):
        one = complementarity(slack, multiplier, SCALE, activity)
        lower, upper = torch.zeros_like(slack), torch.full_like(slack, INF)
        torch.testing.assert_close(rows(slack, -multiplier, lower, upper, activity), one, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            rows(-slack, multiplier, -upper, -lower, activity), -one, rtol=1e-14, atol=0
        )
