"""What F raises while it is tried, what a problem lets go of, and what is nobody's fault but ours."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from tests.execution.systems import Relaxation, batch, cubic
from torch import Tensor

import invlayer_core as inv
from invlayer_core.execution import lockstep, narrowing


@pytest.mark.plugin("invlayer-scipy")
def test_the_reason_tells_what_f_raised_when_it_was_tried() -> None:
    """Only the first evaluation is at a generic point, where no component is zero."""
    calls: list[Tensor] = []

    def picky(y: Tensor, a: Tensor) -> Tensor:
        calls.append(y)
        if len(calls) == 1:
            raise ValueError("out of\nits domain")
        return cubic(y, a)

    y0, a = batch()
    _, info = inv.root(picky, y0, a, solver="scipy.root", return_info=True)
    assert info.batch == "serial"
    assert info.batch_reason == "F could not be tried beforehand (ValueError: out of its domain)"


def test_a_fault_of_the_probe_itself_is_not_taken_for_f(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise IndexError("a fault of our own")

    monkeypatch.setattr(narrowing, "_rowwise", broken)
    y0, a = batch()
    with pytest.raises(IndexError, match="a fault of our own"):
        inv.root(cubic, y0, a, solver=Relaxation())


def test_a_fault_of_the_conductor_is_not_taken_for_f(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, asking: object, wanted: str) -> None:
        raise IndexError("a fault of our own")

    monkeypatch.setattr(lockstep._Conductor, "_answer_alone", broken)
    y0, a = batch()
    inv.root(cubic, y0, a, solver=Relaxation(), batch="lockstep")  # never needed for a sound F

    def raises(y: Tensor, a: Tensor) -> Tensor:
        raise ValueError("F")

    with pytest.raises(IndexError, match="a fault of our own"):
        inv.root(raises, y0, a, solver=Relaxation(), batch="lockstep")


@pytest.mark.parametrize("how", ["serial", "lockstep", "threads"])
def test_an_interrupt_while_f_is_tried_is_an_interrupt(how: inv.implicit.BatchMode) -> None:
    def interrupted(y: Tensor, a: Tensor) -> Tensor:
        raise KeyboardInterrupt

    y0, a = batch()
    with pytest.raises(KeyboardInterrupt):
        inv.root(interrupted, y0, a, solver=Relaxation(), batch=how)


@pytest.mark.parametrize("how", ["serial", "lockstep"])
@pytest.mark.parametrize("point", ["text", [1.0, 2.0, 3.0]])
def test_a_point_that_is_no_vector_stays_with_its_sample(how: inv.implicit.BatchMode, point: object) -> None:
    class Odd(inv.Solver):
        def solve(self, problem, y0, options):  # type: ignore[no-untyped-def]
            if problem.index == 1:
                problem.residual(point if isinstance(point, str) else np.array(point))
            return Relaxation().solve(problem, y0, options)

    y0, a = batch(3)
    _, info = inv.root(cubic, y0, a, solver=Odd(), batch=how, on_failure="nan", return_info=True)
    assert [status.ok for status in info.status] == [True, False, True]
    assert info.status[1] is inv.Status.SOLVER_ERROR


class Keeper(inv.Solver):
    """Keeps its problems, as a library's own bookkeeping may."""

    kept: list[inv.SampleProblem] = []  # noqa: RUF012

    def solve(self, problem, y0, options):  # type: ignore[no-untyped-def]
        self.kept.append(problem)
        return Relaxation().solve(problem, y0, options)


@pytest.mark.parametrize("how", ["serial", "lockstep", "threads"])
def test_a_problem_lets_go_of_f_when_its_solve_is_over(how: inv.implicit.BatchMode) -> None:
    class Conditions:
        def __call__(self, y: Tensor, a: Tensor) -> Tensor:
            return cubic(y, a)

    y0, a = batch()
    conditions = Conditions()
    end = weakref.ref(conditions)
    Keeper.kept.clear()
    with torch.no_grad():
        inv.root(conditions, y0, a, solver=Keeper(), batch=how)
    del conditions
    assert end() is None
    assert len(Keeper.kept) == len(y0)
    with pytest.raises(inv.ConditionsError, match=r"asked for F after its solve had returned.*keep values"):
        Keeper.kept[0].residual(np.zeros(2))
    with pytest.raises(inv.ConditionsError, match="asked for F after its solve had returned"):
        Keeper.kept[0].value(0.0)


@pytest.mark.parametrize("how", ["serial", "lockstep"])
def test_a_scalar_equation_gives_numbers(how: inv.implicit.BatchMode) -> None:
    class Secants(inv.Solver):
        def solve(self, problem, y0, options):  # type: ignore[no-untyped-def]
            y, before = float(y0[0]), float(y0[0]) + 0.1
            value, value_before = problem.value(y), problem.value(before)
            assert type(value) is float
            assert value == problem.residual(np.array([y]))[0]
            steps = 0
            while abs(value) > 1e-14 and steps < 50 and value != value_before:
                y, before = y - value * (y - before) / (value - value_before), y
                value, value_before, steps = problem.value(y), value, steps + 1
            return inv.SolverResult(np.array([y]), True, steps)

    for dtype in (torch.float64, torch.float32):
        a = torch.tensor([0.3, -2.0, 5.0], dtype=dtype, requires_grad=True)
        y = inv.root(cubic, torch.zeros(3, dtype=dtype), a, solver=Secants(), event_dims=0, batch=how)
        torch.testing.assert_close(cubic(y, a), torch.zeros_like(a), rtol=0, atol=10 * torch.finfo(dtype).eps)
        (gradient,) = torch.autograd.grad(y.sum(), a)
        torch.testing.assert_close(gradient, 1 / (1 + 0.3 * y.detach() ** 2))
