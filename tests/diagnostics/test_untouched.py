"""A diagnosis leaves no trace: tensors, .grad, buffers, modes and random generators stay as they are."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tests.diagnostics.defects import batch_of_a, coupled_network, cubic, solve_exactly
from torch import Tensor, nn

import invlayer_core as inv


def test_gradients_and_values_of_the_arguments():
    a = batch_of_a().requires_grad_()
    a.grad = torch.full_like(a, 7.0)
    before, version = a.detach().clone(), a._version
    assert inv.check_layer(inv.RootLayer(cubic, solver=solve_exactly), a, y0=torch.zeros_like(a)).ok
    assert torch.equal(a, before)
    assert a._version == version
    assert torch.equal(a.grad, torch.full_like(a, 7.0))


@pytest.mark.parametrize("hidden", [False, True], ids=["a module", "in a closure"])
def test_parameters_buffers_and_mode_of_a_network(hidden: bool):
    network = coupled_network().train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    versions = [tensor._version for tensor in network.state_dict(keep_vars=True).values()]
    inv.check_layer((lambda a: network(a)) if hidden else network, batch_of_a())
    assert network.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert [tensor._version for tensor in network.state_dict(keep_vars=True).values()] == versions
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_graph_recorded_before_can_still_be_walked():
    network = coupled_network()
    loss = network(batch_of_a()).sum()
    inv.check_layer(network, batch_of_a())
    loss.backward()
    assert network.norm.weight.grad is not None


def test_random_generators():
    class Noisy(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return a * (torch.rand(()) + np.random.rand() + random.random())

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert not inv.check_layer(Noisy(), batch_of_a()).ok
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_arguments_that_the_layer_writes_into():
    def layer(a: Tensor, mask: Tensor) -> Tensor:
        mask.zero_()
        return inv.root(cubic, torch.zeros_like(a), args=a, solver=solve_exactly)

    mask = torch.ones(3, dtype=torch.int64)
    assert inv.check_layer(layer, batch_of_a(), mask).ok
    assert mask.tolist() == [1, 1, 1]


def test_the_settings_of_the_layer():
    layer = inv.RootLayer(cubic, solver=solve_exactly, atol=1e-8)
    a = batch_of_a()
    inv.check_layer(layer, a, y0=torch.zeros_like(a))
    assert layer.keywords == {"atol": 1e-8}


def test_the_same_report_twice():
    a = batch_of_a()
    reports = [
        inv.check_layer(inv.RootLayer(cubic, solver=solve_exactly), a, y0=torch.zeros_like(a)).as_dict()
        for _ in range(2)
    ]
    assert reports[0] == reports[1]
    torch.manual_seed(99)
    again = inv.check_layer(inv.RootLayer(cubic, solver=solve_exactly), a, y0=torch.zeros_like(a)).as_dict()
    assert again == reports[0]


@pytest.mark.parametrize(
    ("layer", "args", "match"),
    [
        (3, (), r"layer is a int; accepted is a layer"),
        (torch.sin, (), r"none of the 0 arguments is a floating-point tensor"),
        (torch.abs, (torch.tensor([1, 2]),), r"none of the 1 arguments is a floating-point tensor"),
        (torch.abs, (torch.tensor([True]),), r"nothing to differentiate by"),
        (lambda a: "done", (torch.ones(2),), r"returned str without a floating-point tensor"),
        (torch.sin, (torch.ones(0, 3),), r"returned tensors without entries, of shapes \[\(0, 3\)\]"),
    ],
)
def test_bad_inputs(layer: object, args: tuple[Tensor, ...], match: str):
    with pytest.raises(inv.ConditionsError, match=match):
        inv.check_layer(layer, *args)


def test_errors_of_the_layer_itself_are_the_users():
    def layer(a: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        inv.check_layer(layer, torch.ones(2))
