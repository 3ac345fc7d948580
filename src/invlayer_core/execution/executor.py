"""Run a per-sample solver over a batch on any ``concurrent.futures.Executor``: a pool, or a cluster.

The batch goes out in chunks, each with the conditions, its rows of the args and the solver. A bounded number
is under way at any time. A chunk whose worker dies is tried again, one sample at a time, so that the others
are saved from the one that killed it.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, final

import torch

from invlayer_core.errors import ConditionsError
from invlayer_core.execution.limits import Limits
from invlayer_core.execution.lockstep import play_all
from invlayer_core.execution.native_threads import core_count, single_native_thread
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import Reports, SampleRecord, SampleReport
from invlayer_core.execution.transfer import pack_report, pack_workload, unpack_workload
from invlayer_core.execution.workload import Workload
from invlayer_core.solvers.contract import Status

__all__ = ["run_on_executor", "solve_chunk"]

_LARGEST = 256  # samples of a chunk: what is lost at most when a worker dies
_PER_WORKER = 4  # chunks, so that uneven ones even out
_GRACE = 30.0  # seconds beyond its timeouts after which a chunk counts as stuck


def solve_chunk(payload: bytes) -> list[bytes]:
    """What a worker does: solve the samples of a chunk, one after the other or in lockstep."""
    workload = unpack_workload(payload)
    with single_native_thread(), torch.no_grad():
        workload = workload.with_starts()
        if not workload.together:
            return [pack_report(workload.report(index)) for index in workload.todo]
        record = Reports(workload.y0)
        play_all(workload, record)
        return [pack_report(record.reports[index]) for index in workload.todo]


@final
@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to before ``stop``, and how often a worker has died of them."""

    start: int
    stop: int
    deaths: int = 0

    def singly(self) -> list[_Chunk]:
        return [_Chunk(i, i + 1, self.deaths + 1) for i in range(self.start, self.stop)]


def run_on_executor(workload: Workload, done: Callable[[], Any]) -> Outcome:
    """Solve chunks of the batch on ``limits.executor``, which stays the caller's.

    Parameters
    ----------
    workload : Workload
    done : callable
        Called whenever a sample is done.

    Raises
    ------
    ConditionsError
        If the workload cannot be sent, or a worker cannot load it.
    """
    executor = workload.limits.executor
    assert executor is not None
    return _Dispatch(workload, executor, SampleRecord(workload.y0, done)).run()


@final
class _Dispatch:
    """Chunks in wait, chunks under way, and what has come back."""

    def __init__(self, workload: Workload, executor: Executor, record: SampleRecord) -> None:
        self.workload, self.executor, self.record = workload, executor, record
        self.most = 2 * _workers(executor)
        self.waiting = deque(_chunks(workload.todo, self.most))
        self.running: dict[Future[Any], tuple[_Chunk, float]] = {}

    def run(self) -> Outcome:
        try:
            while self.waiting or self.running:
                self._submit()
                self._gather()
        except BaseException:  # Ctrl-C: what has not begun does not begin
            for future in self.running:
                future.cancel()
            raise
        return self.record.outcome("executor")

    def _submit(self) -> None:
        # One at a time while there is a suspect: a pool that breaks fails all that it holds.
        most = 1 if any(c.deaths for c, _ in self.running.values()) else self.most
        while self.waiting and len(self.running) < most and not (self.waiting[0].deaths and self.running):
            chunk = self.waiting.popleft()
            part = self.workload.rows(chunk.start, chunk.stop)
            began = time.monotonic()
            try:
                future = self._send(part)
            except RuntimeError as error:  # BrokenProcessPool, or a pool that was shut down
                self._give_up(chunk, error)
                continue
            self.running[future] = (chunk, began)

    def _send(self, part: Workload) -> Future[Any]:
        if isinstance(self.executor, ThreadPoolExecutor):
            return self.executor.submit(lambda: [part.report(index) for index in part.todo])
        return self.executor.submit(solve_chunk, pack_workload(part, "executor="))

    def _gather(self) -> None:
        if not self.running:
            return
        patience = None if self.workload.limits.timeout is None else 0.5
        for future in wait(self.running, patience, FIRST_COMPLETED).done:
            self._take(future, self.running.pop(future)[0])
        for future, (chunk, began) in list(self.running.items()):
            if time.monotonic() > began + _allowance(chunk, self.workload.limits):
                future.cancel()
                del self.running[future]
                self._fail(chunk, SampleReport(Status.TIMED_OUT, "gave no sign within its timeout"))

    def _take(self, future: Future[Any], chunk: _Chunk) -> None:
        try:
            reports = future.result()
        except ConditionsError:  # cannot be loaded over there: no sample is to blame
            raise
        except Exception as error:  # the worker has gone, whatever the executor calls that
            self._retry(chunk, error)
            return
        for index, report in zip(range(chunk.start, chunk.stop), reports, strict=True):
            self.record.add(index, pickle.loads(report) if isinstance(report, bytes) else report)

    def _retry(self, chunk: _Chunk, error: Exception) -> None:
        if chunk.deaths:
            self._give_up(chunk, error)
        else:
            self.waiting.extend(chunk.singly())

    def _give_up(self, chunk: _Chunk, error: Exception) -> None:
        reason = f"the worker was lost{' again' if chunk.deaths else ''}: {type(error).__name__}: {error}"
        self._fail(chunk, SampleReport(Status.SOLVER_ERROR, reason))

    def _fail(self, chunk: _Chunk, report: SampleReport) -> None:
        for index in range(chunk.start, chunk.stop):
            self.record.add(index, report)


def _allowance(chunk: _Chunk, limits: Limits) -> float:
    seconds = float("inf") if limits.timeout is None else limits.timeout
    return (chunk.stop - chunk.start) * seconds + _GRACE


def _workers(executor: Executor) -> int:
    """How many workers an executor has, if it says so."""
    count = getattr(executor, "_max_workers", None)
    if count is None and (client := getattr(executor, "_client", None)) is not None:  # Dask
        count = len(client.scheduler_info().get("workers", ()))
    return max(1, int(count or core_count()))


def _chunks(todo: range, most: int) -> Sequence[_Chunk]:
    size = max(1, min(_LARGEST, -(-len(todo) // (most * _PER_WORKER // 2))))
    return [_Chunk(i, min(i + size, todo.stop)) for i in range(todo.start, todo.stop, size)]
