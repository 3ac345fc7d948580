"""Quadratic programs on a ``concurrent.futures.Executor``: the caller's, or processes for one call.

A program is data, and travels by itself: chunks of programs go out with the solver, and reports come back. A
chunk whose worker is lost takes its samples with it, and no others.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from invlayer_core.errors import ConditionsError
from invlayer_core.execution.native_threads import core_count, single_native_thread
from invlayer_core.execution.samples import SampleRecord, SampleReport, report_of
from invlayer_core.solvers.contract import Solver, Status
from invlayer_core.solvers.quadratic import QuadraticProblem

if TYPE_CHECKING:
    import numpy as np

__all__ = ["own_processes", "run_on_pool", "solve_programs"]

_PER_WORKER = 4  # chunks, so that uneven ones even out

Job = tuple[QuadraticProblem, "np.ndarray"]


def solve_programs(
    solver: Solver, jobs: Sequence[Job], options: Mapping[str, Any], unknowns: int
) -> list[SampleReport]:
    """What a worker does: solve the programs of a chunk, one after the other."""
    with single_native_thread():
        solves = [functools.partial(solver.solve, problem, guess, dict(options)) for problem, guess in jobs]
        return [report_of(solve, unknowns) for solve in solves]


@contextmanager
def own_processes() -> Iterator[Executor]:
    """Worker processes for one call, spawned: torch's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(core_count(), mp_context=context) as pool:
        yield pool


def run_on_pool(
    executor: Executor,
    solver: Solver,
    todo: Sequence[int],
    job: Callable[[int], Job],
    options: Mapping[str, Any],
    record: SampleRecord,
) -> None:
    """Solve the programs ``todo`` on an executor, and keep what becomes of each.

    Raises
    ------
    ConditionsError
        If the solver or its options cannot be sent to another process.
    """
    size = max(1, -(-len(todo) // (_PER_WORKER * core_count())))
    chunks = [todo[start : start + size] for start in range(0, len(todo), size)]
    running: list[tuple[Sequence[int], Future[Any]]] = []
    unknowns = int(record.rows.shape[-1])
    for chunk in chunks:
        jobs = [job(index) for index in chunk]
        running.append((chunk, executor.submit(solve_programs, solver, jobs, options, unknowns)))
    for chunk, future in running:
        for index, report in zip(chunk, _reports(future, len(chunk)), strict=True):
            record.add(index, report)


def _reports(future: Future[Any], count: int) -> list[SampleReport]:
    try:
        reports: list[SampleReport] = future.result()
    except (AttributeError, TypeError, ImportError) as error:  # of pickling, or of loading over there
        raise ConditionsError(
            f"a worker process cannot load the solver or its options ({type(error).__name__}: {error}). "
            "Accepted are classes at the top level of a module that can be imported there."
        ) from error
    except Exception as error:
        if "pickle" in str(error).lower():
            raise ConditionsError(
                f"the solver or its options cannot be sent to another process ({error}). Accepted are "
                "classes at the top level of a module."
            ) from error
        lost = SampleReport(Status.SOLVER_ERROR, f"the worker was lost: {type(error).__name__}: {error}")
        reports = [lost] * count
    return reports
