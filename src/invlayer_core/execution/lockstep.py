"""Run B instances of a per-sample solver so that each round of their calls of F is one batched call.

Every sample's solve runs in a thread of its own, and exactly one thread runs at any time: it holds the
baton. When its solver asks for F (or J), the thread leaves the request and hands the baton to the next
one; the last hands it to the conductor, who answers all requests by *one* evaluation of the batch, and the
next round begins. Torch is only ever called by the conductor, the thread that the user called from.

Threads and not greenlets: MINPACK and LSODA keep C and Fortran frames on the stack while they call back.
Plain locks and not semaphores: a baton changes hands in half the time, and once per request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invlayer_core.execution.limits import SampleTimeout
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord, resting_rows, to_numpy
from invlayer_core.execution.workload import Wanted, Workload
from invlayer_core.solvers.contract import BatchProblem

if TYPE_CHECKING:
    import numpy as np

__all__ = ["run_in_lockstep"]

_THREADS = 256  # solves at once; larger batches go in chunks


@final
class _Cancelled(BaseException):
    """Unwinds a solver whose batch is being abandoned; not an Exception, so that no solver keeps it."""


def _baton() -> threading.Lock:
    """A lock that is held: who acquires it waits until another thread releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@final
class _Player:
    """One solver in its thread, running only while it holds the baton.

    Parameters
    ----------
    index : int
    play : callable
        Solves the sample, and keeps what becomes of it.
    timeout : float, optional
        Seconds that its own turns, and its share of the answers, may take together.
    """

    def __init__(self, index: int, play: Callable[[_Player], None], timeout: float | None) -> None:
        self.index = index
        self.request: tuple[Wanted, np.ndarray] | None = None
        self.answer: np.ndarray | Exception | None = None
        self.cancelled = self.finished = False
        self.failure: BaseException | None = None
        self.spent, self.timeout = 0.0, timeout
        self.baton, self.after = _baton(), _baton()  # what it waits for, and what it hands on
        self._began = 0.0
        self._thread = threading.Thread(target=self._run, args=(play,), daemon=True)
        self._thread.start()

    def _run(self, play: Callable[[_Player], None]) -> None:
        self.baton.acquire()
        self._began = time.perf_counter()
        try:
            if not self.cancelled:
                play(self)
        except _Cancelled:
            pass
        except BaseException as failure:  # not of the sample (those are kept): the conductor raises it
            self.failure = failure
        finally:
            self.request, self.finished = None, True
            self.after.release()

    def ask(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        """Called by the solver: leave a request, hand the baton on, and wait for the answer."""
        self.request = (wanted, y)
        self.spent += time.perf_counter() - self._began
        if self.timeout is not None and self.spent > self.timeout:
            raise SampleTimeout(self.timeout)
        self.after.release()
        self.baton.acquire()
        self._began = time.perf_counter()
        if self.cancelled:
            raise _Cancelled
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def join(self) -> None:
        self._thread.join()
        if self.failure is not None and not self.cancelled:
            raise self.failure


@final
class _Ensemble:
    """The players of one chunk, and where their baton is."""

    def __init__(self) -> None:
        self.live: list[_Player] = []
        self._own, self._out = _baton(), False

    def play_round(self) -> None:
        """Let every live player run to its next request; those that finish leave."""
        for player, following in zip(self.live, self.live[1:], strict=False):
            player.after = following.baton
        self.live[-1].after = self._own
        self._out = True
        self.live[0].baton.release()
        self._own.acquire()
        self._out = False
        finished = [player for player in self.live if player.finished]
        self.live = [player for player in self.live if not player.finished]
        for player in finished:
            player.join()

    def cancel(self) -> None:
        """End all players where they wait, or at their next request."""
        for player in self.live:
            player.cancelled = True
        if self._out:  # interrupted while waiting: the baton comes back first
            self._own.acquire()
        for player in self.live:
            player.after = _baton()
            player.baton.release()
            player.join()


def run_in_lockstep(workload: Workload, done: Callable[[], Any]) -> Outcome:
    """Solve all samples at once; same results as one after the other, with far fewer calls of F.

    Parameters
    ----------
    workload : Workload
        Its solver is one that several threads may use at once (``SolverSpec.thread_safe``).
    done : callable
        Called whenever a sample is done.
    """
    record = SampleRecord(workload.y0, done)
    resting = resting_rows(workload.y0)

    def play(player: _Player) -> None:
        record.keep(player.index, workload.solve(player.index, player.ask))

    for start in range(workload.todo.start, workload.todo.stop, _THREADS):
        ensemble = _Ensemble()
        try:
            for index in range(start, min(start + _THREADS, workload.todo.stop)):
                ensemble.live.append(_Player(index, play, workload.limits.timeout))
            while ensemble.live:
                ensemble.play_round()
                _answer_all(ensemble.live, workload, resting)
        finally:  # Ctrl-C, or a failure of the conductor itself: leave no thread behind
            ensemble.cancel()
    return record.outcome("lockstep")


def _answer_all(live: Sequence[_Player], workload: Workload, resting: Tensor) -> None:
    problem = workload.problem()
    requests: dict[Wanted, list[_Player]] = {}
    for player in live:
        if player.request is not None:
            requests.setdefault(player.request[0], []).append(player)
    for wanted, asking in requests.items():
        began = time.perf_counter()
        _answer(asking, wanted, workload, problem, resting)
        share = (time.perf_counter() - began) / len(asking)
        for player in asking:
            player.spent += share


def _answer(
    asking: Sequence[_Player], wanted: Wanted, workload: Workload, problem: BatchProblem, resting: Tensor
) -> None:
    """One evaluation for all who ask; one each, only if that raises, to find out whose it was."""
    try:
        rows = resting.clone()
        index = torch.tensor([player.index for player in asking], device=rows.device)
        rows[index] = _stack(asking, problem.size).to(rows)
        values = to_numpy(getattr(problem, wanted)(rows)[index])
    except Exception:
        _answer_alone(asking, wanted, workload)
        return
    for player, value in zip(asking, values, strict=True):
        player.answer = value  # a row of its own, which the solver may overwrite


def _stack(asking: Sequence[_Player], size: int) -> Tensor:
    rows = torch.empty(len(asking), size, dtype=torch.float64)
    array = rows.numpy()
    for row, player in zip(array, asking, strict=True):
        if player.request is not None:
            row[:] = player.request[1].reshape(size)
    return rows


def _answer_alone(asking: Sequence[_Player], wanted: Wanted, workload: Workload) -> None:
    for player in asking:
        assert player.request is not None
        try:
            player.answer = workload.alone(player.index)(wanted, player.request[1])
        except Exception as error:  # handed to the solver of that sample, as in a serial run
            player.answer = error
