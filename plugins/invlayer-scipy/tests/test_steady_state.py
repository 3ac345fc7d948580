"""Steady states by following the flow: values, gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

FLOAT = torch.float64


def brusselator(y: Tensor, k: Tensor) -> Tensor:
    """Prigogine & Lefever, J. Chem. Phys. 48 (1968) 1695: rests at (a, b/a), stable for b < 1 + a²."""
    (x, z), (a, b) = y.unbind(-1), k.unbind(-1)
    return torch.stack([a + x * x * z - (b + 1) * x, b * x - x * x * z], -1)


def flow(y: Tensor, k: Tensor) -> Tensor:
    return y + brusselator(y, k)


def settle(k: Tensor, y0: float = 1.1, **keywords: Any) -> Any:
    start = torch.full(k.shape, y0, dtype=FLOAT)
    return inv.fixed_point(flow, start, k, solver="scipy.solve_ivp", **keywords)


@pytest.mark.parametrize("how", ["serial", "lockstep"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "Radau"}, {"method": "DOP853", "rtol": 1e-10, "atol": 1e-12, "until": 300.0}],
)
def test_values_and_gradients(options: dict[str, Any], how: Any) -> None:
    k = torch.tensor([[1.0, 1.5], [2.0, 3.0], [0.9, 1.0]], dtype=FLOAT, requires_grad=True)
    y = settle(k, options=options, batch=how, polish=1)
    a, b = k.unbind(-1)
    torch.testing.assert_close(y, torch.stack([a, b / a], -1), rtol=1e-10, atol=1e-12)
    weights = torch.tensor([[1.0, -2.0], [0.5, 1.0], [3.0, 1.0]], dtype=FLOAT)
    (gradient,) = torch.autograd.grad((weights * y).sum(), k)
    (expected,) = torch.autograd.grad((weights * torch.stack([a, b / a], -1)).sum(), k)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)
    by_newton = inv.fixed_point(flow, y.detach(), k, solver="torch.newton")
    (second,) = torch.autograd.grad((weights * by_newton).sum(), k)
    torch.testing.assert_close(gradient, second, rtol=1e-9, atol=1e-11)


def test_a_steady_state_that_repels_is_not_found() -> None:
    """Past b = 1 + a² there is a limit cycle, and the flow never rests."""
    k = torch.tensor([[1.0, 1.5], [1.0, 3.0]], dtype=FLOAT)
    _, info = settle(k, options={"until": 50.0}, on_failure="nan", return_info=True)
    assert [status.name for status in info.status] == ["CONVERGED", "NOT_CONVERGED"]
    assert "reached the end of the integration interval" in info.message[1]


def test_the_number_of_steps_is_bounded() -> None:
    k = torch.tensor([[1.0, 1.5], [1.0, 3.0]], dtype=FLOAT)
    _, info = settle(k, options={"maxiter": 300}, on_failure="nan", return_info=True)
    assert [status.name for status in info.status] == ["CONVERGED", "NOT_CONVERGED"]
    assert info.message[1] == "the flow did not come to rest in maxiter=300 steps"
    assert int(info.iterations[1]) == 300


def test_a_flow_that_runs_away_fails_alone() -> None:
    y, info = inv.fixed_point(
        lambda y, a: y + a * y**2 - 1e-3 * y, torch.ones(2, 1, dtype=FLOAT),
        torch.tensor([[-1.0], [1.0]], dtype=FLOAT), solver="scipy.solve_ivp", on_failure="nan",
        return_info=True, options={"method": "RK45", "until": 1e5, "rest": 1e-7},
    )  # fmt: skip
    assert info.status[0].ok
    assert not info.status[1].ok
    assert y[1].isnan().all()


def test_a_start_at_rest() -> None:
    k = torch.tensor([[1.0, 1.0]], dtype=FLOAT)
    _, info = settle(k, y0=1.0, options={"method": "RK45"}, return_info=True)
    assert (info.message[0], int(info.iterations)) == ("y0 is at rest", 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "LSODA"}, ValueError, r"unknown method 'LSODA'; accepted are \['RK45'"),
        ({"t_span": (0, 1)}, TypeError, "scipy.solve_ivp.*t_span"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    k = torch.tensor([[1.0, 1.5]], dtype=FLOAT)
    with pytest.raises((error, inv.ConvergenceError), match=message):
        settle(k, options=options)
