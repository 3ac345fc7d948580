"""Every way to run a batch gives what the serial loop gives, and keeps a fault with its sample."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.execution.systems import FLOAT, SICK, Relaxation, batch, cubic, nested, weighted
from torch import Tensor

import invlayer_core as inv
from invlayer_core.execution.transfer import unpack_workload

IN_PROCESS = ["serial", "lockstep", "threads"]
WAYS = [*IN_PROCESS, pytest.param("processes", marks=pytest.mark.slow)]  # starting workers takes seconds
HEALTHY = [0, 1, 3, 4, 5, 6]
FAULTS = [
    ("throws", inv.Status.SOLVER_ERROR, "FloatingPointError: overflow on the way"),
    ("loops", inv.Status.TIMED_OUT, "stopped after timeout=1.5 seconds"),
    ("gives_nan", inv.Status.NOT_FINITE, ""),
    ("gives_wrong_shape", inv.Status.WRONG_SHAPE, "SolverResult.y has shape (3,)"),
]


def solve(
    how: str, solver: inv.Solver | None = None, f: Any = cubic, args: Any = None, **keywords: Any
) -> Any:
    y0, a = batch()
    keywords = {"on_failure": "nan", "return_info": True} | keywords
    return inv.root(f, y0, a if args is None else args, solver=solver or Relaxation(), batch=how, **keywords)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Any:
    threads, children = threading.active_count(), multiprocessing.active_children()
    yield
    assert threading.active_count() == threads
    assert multiprocessing.active_children() == children


@pytest.mark.parametrize("how", [*IN_PROCESS, "processes"])
def test_equals_serial_bitwise(how: str) -> None:
    expected, serial = solve("serial")
    y, info = solve(how)
    assert torch.equal(y, expected)
    assert (info.batch, info.batch_reason) == (how, "")
    assert torch.equal(info.iterations, serial.iterations)
    assert (info.message, info.aux) == (serial.message, serial.aux)


@pytest.mark.parametrize("how", WAYS)
def test_shapes_and_shared_args(how: str) -> None:
    """Two batch dims, B = n, one sample, and an arg that all samples share."""
    weight = torch.tensor([0.1, 0.3], dtype=FLOAT)
    for shape in ((2, 2, 2), (2, 2), (2,), (0, 2)):
        a = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=FLOAT).reshape(shape).requires_grad_()
        results = [
            inv.root(weighted, torch.zeros(shape, dtype=FLOAT), (a, weight), solver=Relaxation(), batch=way)
            for way in ("serial", how)
        ]
        gradients = [torch.autograd.grad(y.sum(), a)[0] for y in results]
        assert torch.equal(*results)
        assert torch.equal(*gradients)
        torch.testing.assert_close(
            gradients[0], 1 / (1 + 3 * weight * results[0].detach() ** 2), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("fault", "status", "message"), FAULTS)
def test_a_fault_stays_with_its_sample(how: str, fault: str, status: inv.Status, message: str) -> None:
    expected, _ = solve("serial")
    y, info = solve(how, Relaxation(fault), timeout=1.5)
    assert info.status[SICK] is status
    assert info.message[SICK].startswith(message)
    assert torch.equal(y[HEALTHY], expected[HEALTHY])
    assert y[SICK].isnan().all()


@pytest.mark.slow
def test_a_solver_that_never_asks_for_f_is_killed_in_its_process() -> None:
    expected, _ = solve("serial")
    y, info = solve("processes", Relaxation("hangs"), timeout=1.5)
    assert info.status[SICK] is inv.Status.TIMED_OUT
    assert info.message[SICK] == "stopped after timeout=1.5 seconds, by killing its process"
    assert torch.equal(y[HEALTHY], expected[HEALTHY])


@pytest.mark.slow
def test_a_worker_that_dies_takes_no_other_sample_with_it() -> None:
    expected, _ = solve("serial")
    y, info = solve("processes", Relaxation("dies"))
    assert info.status[SICK] is inv.Status.SOLVER_ERROR
    assert info.message[SICK] == "the worker process died twice at this sample, at last with exit code 7"
    assert torch.equal(y[HEALTHY], expected[HEALTHY])


@pytest.mark.slow
def test_a_sample_gets_a_second_chance(tmp_path: Any) -> None:
    again, _ = solve("processes", Relaxation("dies_once", str(tmp_path / "died")))
    assert torch.equal(again, solve("serial")[0])


@pytest.mark.slow
def test_what_cannot_travel_becomes_text() -> None:
    _, info = solve("processes", Relaxation("raises_what_cannot_travel"))
    assert info.message[SICK] == "Unpicklable: holds a file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        y, info = solve("processes", Relaxation("keeps_a_file"))
    assert info.ok.all()
    assert "TextIOWrapper" in info.aux[SICK]["file"]
    assert y.isfinite().all()


@pytest.mark.parametrize("how", WAYS)
def test_conditions_that_solve_another_layer(how: str) -> None:
    y0, a = batch(3)
    y = inv.root(nested, y0, a, solver=Relaxation(), batch=how)
    inner = inv.root(cubic, torch.zeros_like(y), y)
    torch.testing.assert_close(y + 0.1 * inner, a, rtol=0, atol=1e-12)


@pytest.mark.plugin("invlayer-scipy")
def test_conditions_that_solve_another_layer_chosen_and_in_a_pool() -> None:
    y0, a = batch(9)
    inner = lambda y: inv.root(cubic, torch.zeros_like(y), y)  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        for keywords in ({}, {"executor": pool}, {"executor": Inline()}):
            y = inv.root(nested, y0, a, solver="scipy.fsolve", **keywords)
            torch.testing.assert_close(y + 0.1 * inner(y), a, rtol=0, atol=1e-7)


@pytest.mark.parametrize("make", ["inline", "threads", pytest.param("pool", marks=pytest.mark.slow)])
def test_a_fault_on_an_executor_stays_with_its_sample(make: str) -> None:
    expected, _ = solve("serial")
    with EXECUTORS[make]() as executor:
        for fault, status, message in FAULTS:
            y, info = solve("auto", Relaxation(fault), executor=executor, timeout=1.5)
            assert info.status[SICK] is status
            assert info.message[SICK].startswith(message)
            assert torch.equal(y[HEALTHY], expected[HEALTHY])
        if make == "pool":  # the last, as it breaks the pool
            _, info = solve("auto", Relaxation("dies"), executor=executor)
            assert info.status[SICK] is inv.Status.SOLVER_ERROR
            assert all(info.ok[index] or "the worker was lost" in info.message[index] for index in range(7))


@pytest.mark.plugin("invlayer-scipy")
def test_workers_solve_their_chunks_in_lockstep_where_that_is_faster() -> None:
    y0, a = batch(40)
    keywords: dict = {"solver": "scipy.root", "options": {"method": "lm"}, "return_info": True}
    together: list[bool] = []

    class Looking(Inline):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
            together.append(unpack_workload(args[0]).together)
            return super().submit(fn, *args, **kwargs)

    expected, serial = inv.root(cubic, y0, a, batch="serial", **keywords)
    y, info = inv.root(cubic, y0, a, executor=Looking(), **keywords)
    assert torch.equal(y, expected)
    assert info.iterations.tolist() == serial.iterations.tolist()
    assert set(together) == {True}


class Interrupting(Relaxation):
    """Raises what Ctrl-C raises."""

    def solve(self, problem: Any, y0: Any, options: Any) -> inv.SolverResult:
        if problem.index == SICK:
            raise KeyboardInterrupt
        return self.relax(problem, y0)


@pytest.mark.parametrize("how", IN_PROCESS)
def test_an_interrupt_ends_the_call_and_every_thread(how: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        solve(how, Interrupting())


class Refusing:
    """Conditions that pickle, and do not load."""

    def __call__(self, y: Tensor, a: Tensor) -> Tensor:
        return cubic(y, a)

    def __reduce__(self) -> Any:
        return exec, ("raise ImportError('no such module over there')",)


def test_what_cannot_be_sent_is_an_error() -> None:
    handle = threading.Lock()

    def holding(y: Tensor, a: Tensor) -> Tensor:
        assert not handle.locked()
        return cubic(y, a)

    with pytest.raises(
        inv.ConditionsError, match=r"batch='processes' sends the conditions.*install cloudpickle"
    ):
        solve("processes", f=holding)


@pytest.mark.slow
def test_what_a_worker_cannot_load_is_an_error() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"a worker process cannot load .*no such module over there"
    ):
        solve("processes", f=Refusing())


@pytest.mark.slow
def test_wrong_code_in_a_process_is_raised_as_it_is() -> None:
    with pytest.raises(TypeError, match=r"unsupported operand|must be Tensor"):
        solve("processes", f=broken)


def broken(y: Tensor, a: Tensor) -> Tensor:
    return y + "a"  # type: ignore[operator]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch": "greenlets"}, r"batch='greenlets': accepted are 'auto', 'serial', 'threads', 'processes'"),
        ({"timeout": 0}, r"timeout=0: accepted is a number of seconds > 0, or None"),
        ({"timeout": "1 s"}, r"timeout='1 s': accepted is a number"),
        ({"executor": 4}, r"executor=4: accepted is a concurrent.futures.Executor"),
        ({"progress": 1}, r"progress=1: accepted are True and False"),
        ({"batch": "stacked"}, r"batch='stacked' is for methods that never form J"),
        ({"solver": "torch.newton", "timeout": 1.0}, r"torch.newton takes whole batches.*Leave timeout out"),
        (
            {"solver": "torch.newton", "batch": "threads"},
            r"torch.newton takes whole batches; batch='threads'",
        ),
    ],
)
def test_bad_keywords(keywords: dict, message: str) -> None:
    y0, a = batch()
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(cubic, y0, a, **({"solver": Relaxation()} | keywords))


def test_an_executor_goes_with_auto_alone() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(inv.ConditionsError, match=r"came with executor="):
        solve("threads", executor=pool)


class Inline(Executor):
    """Runs a job when it is submitted; ``lose`` workers are lost first."""

    def __init__(self, lose: int = 0) -> None:
        self.sizes: list[int] = []
        self.lose = lose

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        if self.lose:
            self.lose -= 1
            future.set_exception(OSError("the worker is gone"))
            return future
        result = fn(*args, **kwargs)
        self.sizes.append(len(result))
        future.set_result(result)
        return future


EXECUTORS = {
    "inline": Inline,
    "threads": lambda: ThreadPoolExecutor(2),
    "pool": lambda: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")),
}


@pytest.mark.parametrize("make", [Inline, lambda: ThreadPoolExecutor(2)])
def test_any_executor(make: Any) -> None:
    expected, _ = solve("serial")
    executor = make()
    with executor:
        y, info = solve("auto", executor=executor)
        solve("auto", executor=executor)  # it stays the caller's
    assert torch.equal(y, expected)
    assert info.batch == "executor"
    assert "was given" in info.batch_reason


def test_a_lost_chunk_is_tried_again_sample_by_sample() -> None:
    expected, _ = solve("serial")
    executor = Inline(lose=1)
    y, info = solve("auto", executor=executor)
    assert torch.equal(y, expected)
    assert sum(executor.sizes) == 7
    y, info = solve("auto", executor=Inline(lose=10**6))
    assert {status.name for status in info.status} == {"SOLVER_ERROR"}
    assert info.message[0] == "the worker was lost again: OSError: the worker is gone"


def test_chunks_hold_their_own_rows_alone() -> None:
    """What is sent grows with the chunk and not with the batch."""
    sizes = {}
    for count in (64, 640):
        sent: list[int] = []

        class Watching(Inline):
            def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
                sent.append(max(len(arg) for arg in args if isinstance(arg, bytes)))  # noqa: B023
                return super().submit(fn, *args, **kwargs)

        Watching._max_workers = count // 16  # type: ignore[attr-defined]
        y0, a = batch(count)
        inv.root(cubic, y0, a, solver=Relaxation(), executor=Watching())
        sizes[count] = max(sent)
    assert sizes[640] < 1.1 * sizes[64]


def test_progress_counts_samples(capsys: Any) -> None:
    pytest.importorskip("tqdm")
    solve("serial", progress=True)
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["serial", "threads"])
def test_a_divided_batch_evaluates_single_rows(how: str) -> None:
    """One sample costs one row of F, whatever the size of the batch."""
    y0, a = batch(40)
    rows: list[int] = []

    def watched(y: Tensor, a: Tensor) -> Tensor:
        rows.append(len(y))
        return cubic(y, a)

    inv.root(watched, y0, a, solver=Relaxation(), batch=how)
    assert sorted(set(rows)) == [1, 2, 40]
    # two or three to see that it can be divided and what that costs, one for all starts, one to certify
    assert rows.count(40) in (4, 5)


@pytest.mark.parametrize("how", IN_PROCESS)
def test_conditions_that_cannot_be_divided_are_evaluated_whole(how: str) -> None:
    y0, a = batch()

    def captive(y: Tensor) -> Tensor:  # holds all rows of its arg
        return cubic(y, a)

    assert torch.equal(inv.root(captive, y0, solver=Relaxation(), batch=how), solve("serial")[0])


def test_a_shared_arg_is_not_taken_for_one_row_each() -> None:
    """B = n: (n,) is shared by broadcasting, although it is as long as the batch; y0 = 0 hides it."""
    n = 5
    a, weight = torch.randn(n, n, dtype=FLOAT), torch.linspace(0.1, 0.3, n, dtype=FLOAT)
    y = inv.root(weighted, torch.zeros(n, n, dtype=FLOAT), (a, weight), solver=Relaxation(), batch="serial")
    torch.testing.assert_close(weighted(y, a, weight), torch.zeros_like(y), rtol=0, atol=1e-12)


def test_under_vmap() -> None:
    _, a = batch()
    layer = lambda a: inv.root(cubic, torch.zeros(2, dtype=FLOAT), a, solver=Relaxation(), batch="serial")  # noqa: E731
    assert torch.equal(torch.func.vmap(layer)(a), solve("serial")[0])


def test_auto_tells_why() -> None:
    _, info = solve("auto")
    assert (info.batch, info.batch_reason) == ("serial", "the solver is not declared thread-safe")
