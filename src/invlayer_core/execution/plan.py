"""How a batch runs: what the user asked for, or what is cheapest for this solver, batch and F."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal, final, get_args

from invlayer_core.errors import ConditionsError
from invlayer_core.execution.executor import run_on_executor
from invlayer_core.execution.limits import Limits, progress_bar
from invlayer_core.execution.lockstep import CHUNK, run_in_lockstep
from invlayer_core.execution.narrowing import Probe, probe
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.processes import run_in_processes
from invlayer_core.execution.serial import run_serially
from invlayer_core.execution.stacked import run_stacked
from invlayer_core.execution.threads import run_in_threads
from invlayer_core.execution.workload import Workload

__all__ = ["BatchMode", "check_batch", "check_batched", "run_workload"]

BatchMode = Literal["auto", "serial", "threads", "processes", "lockstep", "stacked"]

_TURN: Final = 6e-6  # seconds that a request in lockstep takes: a change of threads, rows to copy
_START: Final = 80e-6  # seconds that a thread takes to begin and to end
_REQUESTS: Final = 10  # that a solve makes, or more
_FEW: Final = 8  # samples from which Jacobians in batches are worth the threads

_IN_PROCESS: Final = ("serial", "threads", "lockstep")

_RUNS: Final[Mapping[str, Callable[[Workload, Callable[[], Any]], Outcome]]] = MappingProxyType(
    {
        "serial": run_serially,
        "threads": run_in_threads,
        "processes": run_in_processes,
        "executor": run_on_executor,
        "lockstep": run_in_lockstep,
        "stacked": run_stacked,
    }
)


def check_batch(batch: Any, limits: Limits) -> None:
    """Refuse an unknown way, or one that does not go with an executor.

    Raises
    ------
    ConditionsError
        Naming what is accepted.
    """
    if batch not in get_args(BatchMode):
        *most, last = map(repr, get_args(BatchMode))
        raise ConditionsError(f"batch={batch!r}: accepted are {', '.join(most)} and {last}.")
    if limits.executor is not None and batch != "auto":
        raise ConditionsError(
            f"batch={batch!r} came with executor=: that is a way of its own to run a batch. Accepted with an "
            "executor is batch='auto'."
        )


def check_batched(name: str, asked: str, limits: Limits) -> None:
    """Refuse the ways of per-sample solvers for one that takes whole batches.

    Raises
    ------
    ConditionsError
        Naming what came.
    """
    if asked != "auto":
        raise ConditionsError(
            f"{name} takes whole batches; batch={asked!r} is for per-sample solvers. Accepted is 'auto'."
        )
    given = [name for name, value in vars(limits).items() if value]
    if given:
        raise ConditionsError(
            f"{name} takes whole batches in one call; {given[0]}={getattr(limits, given[0])!r} is for "
            f"per-sample solvers. Leave {given[0]} out."
        )


@final
@dataclass(frozen=True)
class _Choice:
    """One way, and why it was chosen."""

    how: str
    why: str


def run_workload(workload: Workload, asked: BatchMode, *, thread_safe: bool) -> Outcome:
    """Choose a way, go it, and note it in the outcome.

    Parameters
    ----------
    workload : Workload
    asked : BatchMode
    thread_safe : bool
        Whether several threads may use the solver at once.

    Raises
    ------
    ConditionsError
        If the solver cannot be run as asked.
    """
    if asked == "stacked":
        _require_stackable(workload)
    if asked == "lockstep":
        _require_turns(workload)
    count = len(workload.todo)
    divides = count > 1 and asked != "stacked" and (asked != "lockstep" or count > CHUNK)
    tried = probe(workload, timed=asked == "auto") if divides else Probe(None, 0.0, 0.0)
    workload = replace(workload, rowwise=tried.rowwise)
    choice = _choose(workload, tried, thread_safe=thread_safe) if asked == "auto" else _Choice(asked, "")
    if count == 0:
        choice = _Choice("serial", "the batch is empty")
    if count > 1 and choice.how in _IN_PROCESS:
        workload = workload.with_starts()
    if choice.how == "executor":
        workload = replace(
            workload, together=_among_themselves(workload, tried, thread_safe).how == "lockstep"
        )
    with progress_bar(count, show=workload.limits.progress) as done:
        outcome = _RUNS[choice.how](workload, done)
    return replace(outcome, why=choice.why)


def _choose(workload: Workload, tried: Probe, *, thread_safe: bool) -> _Choice:
    if workload.limits.executor is not None:
        return _Choice("executor", f"executor={type(workload.limits.executor).__name__} was given")
    return _among_themselves(workload, tried, thread_safe)


def _among_themselves(workload: Workload, tried: Probe, thread_safe: bool) -> _Choice:
    """How samples run that one process solves."""
    count, options = workload.y0.shape[0], workload.options_of(0) if workload.y0.shape[0] else {}
    if count < 2:
        return _Choice("serial", "there is but one sample")
    # Never "stacked" unasked: there a sample's value depends on the others, within the tolerance.
    if not thread_safe:
        return _Choice("serial", "the solver is not declared thread-safe")
    if not workload.solver.takes_turns(options):
        return _Choice("serial", "the solver holds a lock while it asks for F")
    solver = workload.solver
    if count >= _FEW and solver.takes_jacobian(options) and solver.renews_jacobian(options):
        return _Choice("lockstep", "the solver asks for Jacobians on its way, which are dear one by one")
    return _by_cost(tried, count)


def _by_cost(tried: Probe, count: int) -> _Choice:
    """Lockstep where a sample's share of F for all, and its turn, cost less than F for it alone."""
    if tried.refusal:
        return _Choice("serial", f"F could not be tried beforehand ({' '.join(tried.refusal.split())})")
    share = tried.whole / count
    measured = (
        f"F takes {tried.alone * 1e6:.0f} µs for one sample, {tried.whole * 1e6:.0f} µs for all {count}"
        + ("" if tried.rowwise is not None else ", and its args cannot be divided by samples")
    )
    threads = _START * min(count, CHUNK) / count / _REQUESTS
    if tried.alone > share + _TURN + threads:
        return _Choice("lockstep", measured)
    return _Choice("serial", f"{measured}: turns in lockstep would cost more than they save")


def _require_turns(workload: Workload) -> None:
    if workload.y0.shape[0] and not workload.solver.takes_turns(workload.options_of(0)):
        raise ConditionsError(
            f"{workload.name} with options {sorted(workload.options_of(0))} holds a lock while it asks for "
            "F: batch='lockstep' would never end. Accepted are 'auto', 'serial', 'threads' and 'processes'."
        )


def _is_stackable(workload: Workload) -> bool:
    per_sample = any(tensor.ndim for tensor in workload.option_tensors)
    return not per_sample and workload.solver.is_stackable(workload.options_of(0))


def _require_stackable(workload: Workload) -> None:
    if workload.y0.shape[0] and not _is_stackable(workload):
        raise ConditionsError(
            f"{workload.name} with options {sorted(workload.options_of(0))}: batch='stacked' is for methods "
            "that never form J (scipy.root with method='krylov') and for options without per-sample tensors. "
            "Accepted here are 'auto', 'serial', 'threads', 'processes' and 'lockstep'."
        )
