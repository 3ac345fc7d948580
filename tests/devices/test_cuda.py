"""The engine on a CUDA device gives the CPU's numbers, on the device, and does not copy in the backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.devices.op_counter import HostTraffic
from tests.devices.scenarios import SCENARIOS, conditions, derivatives, problem
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
# Rounding differs between the kernels of two devices; these systems have condition numbers below ten.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SENSITIVE = {"ill_conditioned": 1e-3}  # Hilbert's matrix of order 9: condition number 5e11
ONE_STEP = 1.0  # by which counts of iterations may differ

SOLVERS = pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy"))]
)


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return DEVICE


def assert_same(ours: list[Tensor], theirs: list[Tensor], name: str = "") -> None:
    assert {tensor.device.type for tensor in ours} == {DEVICE}
    for one, other in zip(ours, theirs, strict=True):
        tolerance = SENSITIVE.get(name, TOLERANCE.get(other.dtype, ONE_STEP))
        gap = (one.detach().cpu().double() - other.detach().double()).norm()
        assert bool(gap <= tolerance * (1 + other.detach().double().norm()))


def solved(device: str, solver: str, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    y0, a, b = problem(device, 5)
    return inv.root(conditions, y0, (a, b), solver=solver, **keywords), a, b


@SOLVERS
def test_forward_backward_and_double_backward(device: str, solver: str) -> None:
    assert_same(derivatives(*solved(device, solver)), derivatives(*solved("cpu", solver)))


@pytest.mark.parametrize("how", ["serial", "lockstep"])
@pytest.mark.plugin("invlayer-scipy")
def test_both_ways_of_running_a_batch(device: str, how: str) -> None:
    ours = derivatives(*solved(device, "scipy.fsolve", batch=how))
    assert_same(ours, derivatives(*solved("cpu", "scipy.fsolve", batch=how)))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_of_the_fake_device(device: str, name: str) -> None:
    run = SCENARIOS[name]
    assert_same(run(device), run("cpu"), name)


@SOLVERS
def test_mixed_devices_are_refused(device: str, solver: str) -> None:
    y0, a, b = problem(device, 5)
    with pytest.raises(inv.ConditionsError, match=r"y0 is on cpu but tensor 0 of args .* is on cuda:0"):
        inv.root(conditions, y0.cpu(), (a, b), solver=solver)


@SOLVERS
def test_a_constant_on_the_cpu_inside_f_is_an_error(device: str, solver: str) -> None:
    y0, a, b = problem(device, 5)
    constant = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises((RuntimeError, inv.InvlayerError), match="same device"):
        inv.root(lambda y, a, b: conditions(y, a, b) + constant, y0, (a, b), solver=solver)


@pytest.mark.plugin("invlayer-scipy")
def test_backward_copies_nothing(device: str) -> None:
    """Whoever solved it: once y* is back on the device, nothing leaves it again."""
    y, a, b = solved(device, "scipy.fsolve")
    with HostTraffic() as traffic:
        derivatives(y, a, b)
    assert traffic.copies == []


def test_backward_synchronises_no_more_often_than_on_record(device: str) -> None:
    """CUDA's own count of synchronisations, against the two that ``test_host_traffic.py`` lists."""
    y, a, b = solved(device, "torch.newton")
    torch.autograd.grad(y.sum(), (a, b), retain_graph=True)  # libraries synchronise as they start
    assert _synchronisations(lambda: torch.autograd.grad(y.sum(), (a, b))) <= 2


def _synchronisations(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
