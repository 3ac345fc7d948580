"""Lockstep: the same results as one sample after the other, from far fewer evaluations of F."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

FLOAT = torch.float64


class Relaxation(inv.Solver):
    """Damped fixed-point iteration in NumPy, as opaque as a solver gets; ``hook`` may misbehave."""

    def __init__(self, hook: Callable[[int, int], None] = lambda index, step: None) -> None:
        self.hook = hook

    def solve(self, problem, y0, options):  # type: ignore[no-untyped-def]
        y = y0
        for step in range(200):
            self.hook(problem.index, step)
            residual = problem.residual(y)
            if np.abs(residual).max() < 1e-13:
                return inv.SolverResult(y, True, step)
            y -= 0.5 * residual
        return inv.SolverResult(y, False, 200, "ran out of steps")


class Counted:
    """F(y, a) = y + y³/10 − a, counting its evaluations."""

    def __init__(self) -> None:
        self.calls = 0
        self.threads: set[int] = set()

    def __call__(self, y: Tensor, a: Tensor) -> Tensor:
        self.calls += 1
        self.threads.add(threading.get_ident())
        return y + 0.1 * y**3 - a


def problem(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 2, generator=generator, dtype=FLOAT)
    return torch.zeros(count, 2, dtype=FLOAT), a


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 150])
def test_equals_serial_bitwise(count: int) -> None:
    y0, a = problem(count)
    f = Counted()
    serial, serial_info = inv.root(f, y0, a, solver=Relaxation(), batch="serial", return_info=True)
    lockstep, info = inv.root(f, y0, a, solver=Relaxation(), batch="lockstep", return_info=True)
    assert torch.equal(serial, lockstep)
    assert torch.equal(info.iterations, serial_info.iterations)
    assert (serial_info.batch, info.batch) == ("serial", "lockstep")


def test_calls_f_once_a_round_and_in_the_calling_thread() -> None:
    y0, a = problem(50)
    f, g = Counted(), Counted()
    _, info = inv.root(f, y0, a, solver=Relaxation(), batch="lockstep", return_info=True)
    inv.root(g, y0, a, solver=Relaxation(), batch="serial")
    rounds = int(info.iterations.max()) + 1
    assert f.calls == rounds + 1  # and once to certify
    probes = g.calls - (int(info.iterations.sum()) + 1 + 1)  # all starts at once, and the certificate
    assert probes == 4  # to see that a sample may be evaluated alone
    assert f.threads == {threading.get_ident()}


def test_one_that_throws_is_alone() -> None:
    def hook(index: int, step: int) -> None:
        if index == 2 and step == 3:
            raise FloatingPointError("overflow in the third step")

    y0, a = problem()
    y, info = inv.root(
        Counted(), y0, a, solver=Relaxation(hook), batch="lockstep", on_failure="nan", return_info=True
    )
    clean = inv.root(Counted(), y0, a, solver=Relaxation(), batch="lockstep")
    assert info.status[2] == inv.Status.SOLVER_ERROR
    assert "overflow in the third step" in info.message[2]
    keep = [0, 1, 3, 4, 5, 6]
    assert torch.equal(y[keep], clean[keep])
    assert y[2].isnan().all()


def test_conditions_that_throw_reach_only_their_sample() -> None:
    y0, a = problem()

    def picky(y: Tensor, a: Tensor) -> Tensor:
        if bool((y[4].abs() > 0.05).any()):
            raise ValueError("sample 4 left its domain")
        return y + 0.1 * y**3 - a

    a[4] = 1.0
    solver = Relaxation()
    # The certificate itself evaluates F at what came out, so the offender must come out harmless.
    with pytest.raises(
        inv.ConvergenceError, match=r"sample 4: SOLVER_ERROR.*sample 4 left its domain"
    ) as caught:
        inv.root(picky, y0, a, solver=solver, batch="lockstep")
    assert [status.ok for status in caught.value.info.status] == [True] * 4 + [False] + [True] * 2


def test_no_thread_is_left_behind_by_an_interrupt() -> None:
    y0, a = problem()
    before = threading.active_count()
    calls = 0

    def interrupted(y: Tensor, a: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return y + 0.1 * y**3 - a

    with pytest.raises(KeyboardInterrupt):
        inv.root(interrupted, y0, a, solver=Relaxation(), batch="lockstep")
    assert threading.active_count() == before


def test_nested_layers() -> None:
    """F of the outer layer solves an inner layer in lockstep at every evaluation."""
    y0, a = problem(3)
    a.requires_grad_()

    def outer(y: Tensor, a: Tensor) -> Tensor:
        inner = inv.root(Counted(), torch.zeros_like(y), y, solver=Relaxation(), batch="lockstep")
        return y + 0.1 * inner - a

    y = inv.root(outer, y0, a, solver=Relaxation(), batch="lockstep")
    (gradient,) = torch.autograd.grad(y.sum(), a)
    with torch.no_grad():
        inner = inv.root(Counted(), y0, y.detach())
    slope = 1 / (1 + 0.3 * inner**2)
    torch.testing.assert_close(gradient, 1 / (1 + 0.1 * slope), rtol=1e-11, atol=0)


def test_gradients_do_not_depend_on_how_the_batch_ran() -> None:
    y0, a = problem()
    a.requires_grad_()
    gradients = [
        torch.autograd.grad(inv.root(Counted(), y0, a, solver=Relaxation(), batch=how).sum(), a)[0]
        for how in ("serial", "lockstep")
    ]
    assert torch.equal(*gradients)


def test_a_batched_solver_refuses_lockstep() -> None:
    y0, a = problem()
    with pytest.raises(inv.ConditionsError, match=r"torch.newton takes whole batches; batch='lockstep'"):
        inv.root(Counted(), y0, a, batch="lockstep")


def test_unknown_way_is_refused() -> None:
    y0, a = problem()
    with pytest.raises(inv.ConditionsError, match=r"batch='greenlets': accepted are 'auto', 'serial'"):
        inv.root(Counted(), y0, a, batch="greenlets")  # type: ignore[arg-type]


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize("method", ["hybr", "lm", "df-sane", "krylov"])
def test_scipy_methods_equal_serial_bitwise(method: str) -> None:
    y0, a = problem(9)
    options = {"method": method}
    runs = [
        inv.root(Counted(), y0, a, solver="scipy.root", options=options, batch=how, atol=1e-4)
        for how in ("serial", "lockstep")
    ]
    assert torch.equal(*runs)


@pytest.mark.plugin("invlayer-scipy")
def test_auto_takes_lockstep_for_solvers_that_renew_their_jacobian() -> None:
    y0, a = problem(20)
    keywords: dict = {"solver": "scipy.root", "options": {"method": "lm"}, "return_info": True}
    _, info = inv.root(Counted(), y0, a, **keywords)
    _, single = inv.root(Counted(), y0[:1], a[:1], **keywords)
    assert (info.batch, single.batch) == ("lockstep", "serial")
    assert info.batch_reason.startswith("the solver asks for Jacobians on its way")


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize(("power", "how"), [(0.0, "lockstep"), (1.5, "serial")])
def test_auto_weighs_what_f_costs(power: float, how: str) -> None:
    """A solver whose Jacobian at the start serves it to the end gains by lockstep only where F is dear."""

    def f(y: Tensor, a: Tensor) -> Tensor:
        time.sleep(5e-3 * len(y) ** power)  # a batch costs as much as a row, or more than its rows alone
        return y + 0.1 * y**3 - a

    y0, a = problem(8)
    _, info = inv.root(f, y0, a, solver="scipy.fsolve", return_info=True)
    assert info.batch == how
    assert info.batch_reason.startswith("F takes")


class Malformed(inv.Solver):
    """Sample 0 returns a result that no one can read."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def solve(self, problem, y0, options):  # type: ignore[no-untyped-def]
        fields = self.fields if problem.index == 0 else {}
        return inv.SolverResult(**{"y": np.ones(problem.size), "iterations": 1, **fields})


@pytest.mark.parametrize("how", ["serial", "lockstep"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": None}, "SolverResult.iterations is None"),
        ({"iterations": float("nan")}, "SolverResult.iterations is nan"),
        ({"success": np.array([True, False])}, "SolverResult.success is array"),
        ({"message": None}, "SolverResult.message is None"),
        ({"aux": None}, "SolverResult.aux is None"),
        ({"y": "no numbers"}, "SolverResult.y is not an array of numbers"),
        ({"y": np.ones(5)}, "SolverResult.y has shape"),
    ],
)
def test_a_malformed_result_stays_with_its_sample(how: str, fields: dict, message: str) -> None:
    def f(y: Tensor) -> Tensor:
        return y - 1

    y, info = inv.root(
        f, torch.zeros(3, 2, dtype=FLOAT), solver=Malformed(**fields), batch=how, on_failure="nan",
        return_info=True,
    )  # fmt: skip
    assert [status.name for status in info.status] == ["WRONG_SHAPE", "CONVERGED", "CONVERGED"]
    assert message in info.message[0]
    assert y[0].isnan().all()
    assert torch.equal(y[1:], torch.ones(2, 2, dtype=FLOAT))


def test_a_failure_of_the_bookkeeping_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from invlayer_core.execution.samples import SampleRecord

    def broken(self: SampleRecord, index: int, solve: object) -> None:
        raise MemoryError("no room for the record")

    monkeypatch.setattr(SampleRecord, "keep", broken)
    before = threading.active_count()
    y0, a = problem()
    with pytest.raises(MemoryError, match="no room for the record"):
        inv.root(Counted(), y0, a, solver=Relaxation(), batch="lockstep")
    assert threading.active_count() == before
