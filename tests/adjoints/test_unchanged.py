"""Conditions that are no longer, in the backward, what was solved and certified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

CHANGED = r"the conditions '.*' are not what they were when the solution was certified"
LINEAR = [
    inv.linear.Auto,
    inv.linear.Cholesky,
    inv.linear.Lstsq,
    inv.linear.GMRES,
    pytest.param(inv.linear.SparseLU, marks=pytest.mark.plugin("invlayer-scipy")),
]


class Spring:
    """k y³ + y − a, with k where no one sees it."""

    def __init__(self, stiffness: float = 1.0) -> None:
        self.stiffness = torch.tensor(stiffness)

    def __call__(self, y: Tensor, a: Tensor) -> Tensor:
        return self.stiffness * y**3 + y - a


def load(batch: int) -> Tensor:
    return torch.linspace(1.0, 2.0, 3 * batch).reshape(batch, 3).requires_grad_()


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("batch", [1, 4])
def test_an_overwritten_buffer_is_noticed(method: Callable[[], Any], batch: int) -> None:
    spring, a = Spring(), load(batch)
    adjoint = inv.adjoints.Implicit(linear_solver=method())
    y = inv.root(spring, torch.ones(batch, 3), a, adjoint=adjoint)
    y.sum().backward(retain_graph=True)
    spring.stiffness.fill_(1.001)
    with pytest.raises(inv.ConditionsError, match=rf"{CHANGED}.* F of sample 0 has changed by 0\.00"):
        y.sum().backward()


def test_an_attribute_of_the_next_step_is_noticed() -> None:
    """As a loop over time makes it: when the backward comes, the state that they read has gone on."""
    spring, a = Spring(), load(2)
    loss = torch.zeros(())
    for stiffness in (1.0, 2.0):
        spring.stiffness = torch.tensor(stiffness)
        loss = loss + inv.root(spring, torch.ones(2, 3), a).sum()
    with pytest.raises(inv.ConditionsError, match=CHANGED):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*do not satisfy")
def test_dice_are_noticed() -> None:
    dropout = torch.nn.Dropout(0.5)
    a = torch.ones(4, 16, requires_grad=True)
    y = inv.root(
        lambda y, a: y - a - dropout(a), torch.zeros(4, 16), a, on_failure="warn",
        solver=lambda y0, a: y0,
    )  # fmt: skip
    with pytest.raises(inv.ConditionsError, match="roll dice"):
        y.sum().backward()


def test_the_second_backward_notices_too() -> None:
    spring, a = Spring(), load(2)
    y = inv.root(spring, torch.ones(2, 3), a)
    (slope,) = torch.autograd.grad(y.sum(), a, create_graph=True)
    spring.stiffness = torch.tensor(3.0)
    with pytest.raises((inv.ConditionsError, RuntimeError), match=CHANGED):
        torch.autograd.grad(y.pow(2).sum() + slope.sum(), a)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_rounding_in_large_terms_is_no_change(scale: float) -> None:
    """Each evaluation rounds in its own way here: by 1e-15 of terms as large as ``scale``."""
    generator = torch.Generator().manual_seed(0)

    def noisy(y: Tensor, a: Tensor) -> Tensor:
        noise = 1e-15 * scale * torch.rand(y.shape, generator=generator)
        return scale * (y**3 + y - a) + noise.detach()

    a = load(4)
    y = inv.root(noisy, torch.ones(4, 3), a, atol=1e-6 * scale)
    (slope,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(slope, (1 / (3 * y**2 + 1)).detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("on_failure", ["warn", "nan", "zero_grad"])
@pytest.mark.filterwarnings("ignore:.*do not satisfy")
def test_failed_samples_are_no_change(on_failure: Any) -> None:
    a = load(3)
    with torch.no_grad():
        a[1, 0] = torch.nan
    y = inv.root(Spring(), torch.ones(3, 3), a, on_failure=on_failure)
    (slope,) = torch.autograd.grad(y[::2].sum(), a)
    assert bool(slope[::2].isfinite().all())


def test_conditions_that_hold_loosely_may_change_as_much() -> None:
    spring, a = Spring(), load(2)
    y = inv.root(spring, torch.ones(2, 3), a, atol=1e-2)
    spring.stiffness.fill_(1.001)
    y.sum().backward()
    assert bool(a.grad.isfinite().all())
