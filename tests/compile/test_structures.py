"""Under torch.compile the graph breaks around structured and complex unknowns, and the numbers stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.structure.problems import LINES, args, loads, mismatch, split_residual
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

EVENT_DIMS = {"pose": 1, "gain": 0}


def conditions(y: dict[str, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return split_residual(y["pose"], y["gain"], a, b)


def of_pytree(a: Tensor, b: Tensor, **keywords: Any) -> Tensor:
    y0 = {"pose": torch.zeros(2, 3), "gain": torch.zeros(2)}
    y = inv.root(conditions, y0, (a, b), event_dims=EVENT_DIMS, **keywords)
    return y["pose"].sum() + y["gain"].pow(2).sum()


def of_complex(s: Tensor, lines: Tensor, **keywords: Any) -> Tensor:
    return inv.root(mismatch, torch.ones_like(s), (s, lines), **keywords).abs().pow(2).sum()


LAYER = inv.RootLayer(conditions, event_dims=EVENT_DIMS)


def of_layer(a: Tensor, b: Tensor) -> Tensor:
    y = LAYER(a, b, y0={"pose": torch.zeros(2, 3), "gain": torch.zeros(2)})
    return y["pose"].sum() + y["gain"].pow(2).sum()


def real_phasor(y: Tensor, z: Tensor) -> Tensor:
    return torch.view_as_real(torch.polar(y[..., 0], y[..., 1]) - z)


def of_complex_args(z: Tensor) -> Tensor:
    start = torch.stack([z.detach().abs() + 0.1, z.detach().angle() + 0.1], -1)
    return inv.root(real_phasor, start, z).pow(3).sum()


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (of_pytree, args(2)),
        (of_layer, args(2)),
        (of_complex, (loads(2), LINES)),
        (of_complex_args, (loads(2)[0],)),
    ],
    ids=["pytree", "layer", "complex", "complex args"],
)
def test_graph_breaks_and_the_numbers_stay(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    results = []
    for call in (function, torch.compile(function, backend="eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(call(*leaves), leaves))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("function", "inputs"), [(of_pytree, args(2)), (of_complex, (loads(2), LINES))])
def test_compiled_rule_is_declined_with_a_warning(function: Any, inputs: Any) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(function(*leaves), leaves)
    with pytest.warns(inv.PerformanceWarning, match="these are a pytree or complex"):
        ours = torch.autograd.grad(function(*leaves, compile=True), leaves)
    assert all(map(torch.equal, ours, expected))


def test_compiled_rule_is_declined_for_complex_args() -> None:
    z = loads(2)[0].requires_grad_()
    start = torch.stack([z.detach().abs() + 0.1, z.detach().angle() + 0.1], -1)
    loss = inv.root(lambda y, z: real_phasor(y, z), start, z, compile=True).pow(3).sum()
    with pytest.warns(inv.PerformanceWarning, match="args are complex"):
        loss.backward()
    torch.testing.assert_close(z.grad, torch.autograd.grad(of_complex_args(z), z)[0])


def test_layers_of_pytrees_can_be_copied() -> None:
    a, b = args(2)
    twin = copy.deepcopy(LAYER)
    y0 = {"pose": torch.zeros(2, 3), "gain": torch.zeros(2)}
    assert torch.equal(twin(a, b, y0=y0)["pose"], LAYER(a, b, y0=y0)["pose"])
