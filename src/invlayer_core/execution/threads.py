"""Run a per-sample solver over a batch in free-running threads.

It gains only where the solver, or F, spends its time outside Python's lock: a web service, a C library that
releases it. Results do not depend on the order in which the threads get on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, final

from invlayer_core.execution.native_threads import core_count, single_native_thread
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord, SampleReport
from invlayer_core.execution.workload import Workload

__all__ = ["run_in_threads"]


@final
class _Cancelled(BaseException):
    """Unwinds a solver whose batch is being abandoned; not an Exception, so that no solver keeps it."""


def run_in_threads(workload: Workload, done: Callable[[], Any]) -> Outcome:
    """Solve each sample by itself, several at a time.

    Parameters
    ----------
    workload : Workload
        Its solver, and its conditions, are such that several threads may use them at once.
    done : callable
        Called, in the calling thread, whenever a sample is done.
    """
    record, cancelled = SampleRecord(workload.y0, done), threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise _Cancelled

    workers = max(1, min(len(workload.todo), core_count()))
    with single_native_thread(), ThreadPoolExecutor(workers, "invlayer") as pool:
        jobs = ((i, lambda i=i: pool.submit(workload.report, i, check)) for i in workload.todo)
        try:
            _collect(iter(jobs), 2 * workers, record)
        except BaseException:  # Ctrl-C: the solves end at their next call of F, those in wait not at all
            cancelled.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return record.outcome("threads")


def _collect(
    jobs: Iterator[tuple[int, Callable[[], Future[SampleReport]]]], most: int, record: SampleRecord
) -> None:
    """Keep up to ``most`` jobs under way, and what becomes of each."""
    running: dict[Future[SampleReport], int] = {}
    while True:
        running |= {submit(): index for index, submit in islice(jobs, most - len(running))}
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            record.add(running.pop(future), future.result())
