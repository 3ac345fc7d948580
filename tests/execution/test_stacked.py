"""Stacked: one Krylov solve for the whole batch, whose samples still fail one by one."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tests.execution.systems import FLOAT, SICK, batch, cubic, nested
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.plugin("invlayer-scipy")

KRYLOV: dict = {"method": "krylov", "fatol": 1e-12}
HEALTHY = [0, 1, 3, 4, 5, 6]


def solve(f: Any = cubic, a: Tensor | None = None, **keywords: Any) -> Any:
    y0, args = batch()
    keywords = {"batch": "stacked", "options": KRYLOV, "on_failure": "nan", "return_info": True} | keywords
    return inv.root(f, y0, args if a is None else a, solver="scipy.root", **keywords)


def test_equals_serial_within_the_tolerance_from_far_fewer_evaluations() -> None:
    calls = {"serial": 0, "stacked": 0}

    def counted(how: str) -> Any:
        def f(y: Tensor, a: Tensor) -> Tensor:
            calls[how] += 1
            return cubic(y, a)

        return f

    results = {how: solve(counted(how), batch=how) for how in calls}
    torch.testing.assert_close(results["stacked"][0], results["serial"][0], rtol=0, atol=1e-11)
    assert results["stacked"][1].batch == "stacked"
    assert calls["stacked"] < calls["serial"] / 2


def test_gradients_are_those_of_the_implicit_function() -> None:
    y0, a = batch()
    a.requires_grad_()
    y = inv.root(cubic, y0, a, solver="scipy.root", options=KRYLOV, batch="stacked")
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, 1 / (1 + 0.3 * y.detach() ** 2), rtol=1e-12, atol=0)


def test_a_sample_without_a_finite_residual_stays_alone() -> None:
    expected, _ = solve(batch="serial")
    _, a = batch()
    a[SICK] = torch.nan
    y, info = solve(a=a)
    assert info.ok.tolist() == [i != SICK for i in range(7)]
    torch.testing.assert_close(y[HEALTHY], expected[HEALTHY], rtol=0, atol=1e-11)


def test_a_sample_without_a_root_stays_alone() -> None:
    def f(y: Tensor, a: Tensor) -> Tensor:
        return torch.where(a < 5, cubic(y, a), y * y + 1)

    expected, _ = solve(batch="serial")
    _, a = batch()
    a[SICK] = 9.0
    y, info = solve(f, a, options=KRYLOV | {"maxiter": 60})
    assert [i for i, status in enumerate(info.status) if not status.ok] == [SICK]
    torch.testing.assert_close(y[HEALTHY], expected[HEALTHY], rtol=0, atol=1e-9)


def test_conditions_that_throw_reach_only_their_sample() -> None:
    def f(y: Tensor, a: Tensor) -> Tensor:
        if bool(((a > 5) & (y.abs() > 0.5)).any()):
            raise FloatingPointError("out of its domain")
        return cubic(y, a)

    expected, _ = solve(batch="serial")
    _, a = batch()
    a[SICK] = 9.0
    y, info = solve(f, a)
    assert info.status[SICK] is inv.Status.SOLVER_ERROR
    assert "out of its domain" in info.message[SICK]
    torch.testing.assert_close(y[HEALTHY], expected[HEALTHY], rtol=0, atol=1e-9)


def test_a_sample_that_takes_too_long_is_stopped() -> None:
    """F is slow wherever the sick sample moves: the stack runs out of time, and then only that sample."""

    def f(y: Tensor, a: Tensor) -> Tensor:
        if bool(((a > 5) & (y != 0)).any()):
            time.sleep(0.2)
        return cubic(y, a)

    _, a = batch()
    a[SICK] = 9.0
    _, info = solve(f, a, timeout=0.3)
    assert [i for i, status in enumerate(info.status) if not status.ok] == [SICK]
    assert info.status[SICK] is inv.Status.TIMED_OUT


def test_conditions_that_solve_another_layer() -> None:
    y0, a = batch(3)
    y = inv.root(nested, y0, a, solver="scipy.root", options=KRYLOV, batch="stacked")
    inner = inv.root(cubic, torch.zeros_like(y), y)
    torch.testing.assert_close(y + 0.1 * inner, a, rtol=0, atol=1e-11)


def test_it_is_never_chosen_unasked() -> None:
    y0, a = batch(300)
    _, info = inv.root(cubic, y0, a, solver="scipy.root", options=KRYLOV, return_info=True)
    assert info.batch in ("serial", "lockstep")
    assert a.dtype == FLOAT
