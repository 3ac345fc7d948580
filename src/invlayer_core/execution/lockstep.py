"""Run B instances of a per-sample solver so that each round of their calls of F is one batched call.

Every sample's solve runs in a thread of its own, and exactly one thread runs at any time: it holds the
baton. When its solver asks for F (or J), the thread leaves the request and hands the baton to the next
one; the last hands it to the conductor, who answers all requests by *one* evaluation of the batch, and the
next round begins. Torch is only ever called by the conductor, the thread that the user called from.

Threads and not greenlets: MINPACK and LSODA keep C and Fortran frames on the stack while they call back.
Plain locks and not semaphores: a baton changes hands in half the time, and once per request.

Batches of more samples than threads go in chunks, whose rows stay where they are until the chunk is done: so
the place of a row among those that F is evaluated at, on which its rounding may depend, is that of its number
alone, and not a matter of what the others do.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch

from invlayer_core.execution.collection import no_collection
from invlayer_core.execution.evaluation import Function
from invlayer_core.execution.limits import SampleTimeout
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord, resting_rows, to_numpy
from invlayer_core.execution.workload import Workload

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CHUNK", "play_all", "run_in_lockstep"]

CHUNK = 64
"""Threads, and so the samples solved at once. Each takes as long to begin and to end as ten requests,
and the stacks of more fall out of the caches: 128 gain a tenth where a call of F takes 0.3 ms, and lose as
much where it takes 10 µs, or far more on a core whose caches others use too."""


@final
class _Cancelled(BaseException):
    """Unwinds a solver whose batch is being abandoned; not an Exception, so that no solver keeps it."""


def _baton() -> threading.Lock:
    """A lock that is held: who acquires it waits until another thread releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _be_patient() -> None:
    """Let this thread, when it is woken, not displace the one that wakes it and still has Python's lock.

    Linux would do so, only to find that the lock is taken, and to switch back: a baton then costs two to
    three changes of threads instead of one. The setting is this thread's own, and ends with it.
    """
    with suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@final
class _Player:
    """A thread that solves one sample at a time, running only while it holds the baton.

    Parameters
    ----------
    play : callable
        Solves the sample that the player is at, and keeps what becomes of it.
    timeout : float, optional
        Seconds that its own turns, and its share of the answers, may take together.
    """

    def __init__(self, play: Callable[[_Player], None], timeout: float | None) -> None:
        self.index: int | None = None  # None: it is to go
        self.wanted: str | None = None  # None: it has solved its sample
        self.point: Any = None
        self.answer: np.ndarray | Exception | None = None
        self.cancelled = False
        self.failure: BaseException | None = None
        self.spent, self.timeout = 0.0, timeout
        self.baton, self.after = _baton(), _baton()  # what it waits for, and what it hands on
        self._began = 0.0
        self._thread = threading.Thread(target=self._run, args=(play,), daemon=True)
        self._thread.start()

    def _run(self, play: Callable[[_Player], None]) -> None:
        _be_patient()
        self.baton.acquire()
        while self.index is not None:
            self.spent, self._began = 0.0, time.perf_counter()
            try:
                play(self)
            except _Cancelled:
                pass
            except BaseException as failure:  # not of the sample (those are kept): the conductor raises it
                self.failure = failure
            self.wanted = None
            self.after.release()
            self.baton.acquire()

    def ask(self, wanted: str) -> Function:
        """What the solver is to call."""
        return partial(self._ask, wanted)

    def _ask(self, wanted: str, y: np.ndarray) -> np.ndarray:
        """Leave a request, hand the baton on, and wait for the answer."""
        self.wanted, self.point = wanted, y
        if self.timeout is not None:
            self._check_time(self.timeout)
        self.after.release()
        self.baton.acquire()
        if self.cancelled:
            raise _Cancelled
        if self.timeout is not None:
            self._began = time.perf_counter()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def _check_time(self, timeout: float) -> None:
        self.spent += time.perf_counter() - self._began
        if self.spent > timeout:
            raise SampleTimeout(timeout)

    def dismiss(self) -> None:
        """End its thread, which waits for the baton."""
        self.index = None
        self.baton.release()
        self._thread.join()


@final
class _Ensemble:
    """All players, those that are at a sample, and where their baton is."""

    def __init__(self, play: Callable[[_Player], None], timeout: float | None) -> None:
        self._play, self._timeout = play, timeout
        self.players: list[_Player] = []
        self.live: list[_Player] = []
        self._own, self._out = _baton(), False

    def begin(self, samples: range) -> None:
        """Give each player one of the samples."""
        with no_collection():
            while len(self.players) < len(samples):
                self.players.append(_Player(self._play, self._timeout))
        self.live = self.players[: len(samples)]
        for player, index in zip(self.live, samples, strict=True):
            player.index = index
        self._line_up()

    def _line_up(self) -> None:
        for player, following in zip(self.live, self.live[1:], strict=False):
            player.after = following.baton
        if self.live:
            self.live[-1].after = self._own

    def play_round(self) -> None:
        """Let every live player run to its next request; those that have solved their sample leave."""
        self._out = True
        self.live[0].baton.release()
        self._own.acquire()
        self._out = False
        asking = [player for player in self.live if player.wanted is not None]
        if len(asking) < len(self.live):
            failure = next((player.failure for player in self.live if player.failure is not None), None)
            self.live = asking
            self._line_up()
            if failure is not None:
                raise failure

    def disband(self) -> None:
        """End all players, where they wait or at their next request."""
        for player in self.live:
            player.cancelled = True
        if self._out:  # interrupted while waiting: the baton comes back first
            self._own.acquire()
        for player in self.live:
            player.after = self._own
            if player.wanted is not None:  # in the middle of a solve, which ends now
                player.baton.release()
                self._own.acquire()
        with no_collection():
            for player in self.players:
                player.dismiss()


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
    play_all(workload, record)
    return record.outcome("lockstep")


def play_all(workload: Workload, record: SampleRecord) -> None:
    """Solve all samples at once, into ``record``."""

    def play(player: _Player) -> None:
        assert player.index is not None
        ask = workload.remembering(player.index, player.ask)
        record.keep(player.index, workload.solve(player.index, ask))

    ensemble = _Ensemble(play, workload.limits.timeout)
    try:
        for start in range(workload.todo.start, workload.todo.stop, CHUNK):
            stop = min(start + CHUNK, workload.todo.stop)
            conductor = _Conductor(workload, start, stop)
            ensemble.begin(range(start, stop))
            while ensemble.live:
                ensemble.play_round()
                conductor.answer(ensemble.live)
    finally:  # Ctrl-C, or a failure of the conductor itself: leave no thread behind
        ensemble.disband()


@final
class _Conductor:
    """Answers the requests of one chunk: by evaluations of its rows alone, where the batch can be divided."""

    def __init__(self, workload: Workload, start: int, stop: int) -> None:
        divided = workload.rowwise is not None
        part = workload.rows(start, stop) if divided else workload
        self._workload, self._first = workload, start if divided else 0
        self._problem, self._like = part.problem(), part.y0
        self._rest = to_numpy(resting_rows(part.y0))

    def answer(self, live: Sequence[_Player]) -> None:
        requests: dict[str, list[_Player]] = {}
        for player in live:
            if player.wanted is not None:
                requests.setdefault(player.wanted, []).append(player)
        for wanted, asking in requests.items():
            began = time.perf_counter()
            self._answer(asking, wanted)
            share = (time.perf_counter() - began) / len(asking)
            for player in asking:
                player.spent += share

    def _answer(self, asking: Sequence[_Player], wanted: str) -> None:
        """One evaluation for all who ask; one each, only if that raises, to find out whose it was."""
        points, first = self._rest.copy(), self._first
        try:
            for player in asking:
                points[player.index - first] = player.point  # type: ignore[operator]
        except (TypeError, ValueError):  # no vector of numbers
            self._answer_alone(asking, wanted)
            return
        rows = torch.from_numpy(points).to(self._like)
        try:
            values = to_numpy(getattr(self._problem, wanted)(rows))
        except Exception:  # F is the user's, and may raise anything: here for all, there for whom it concerns
            self._answer_alone(asking, wanted)
            return
        for player in asking:  # a row of its own, which the solver may overwrite
            player.answer = values[player.index - first]  # type: ignore[operator]

    def _answer_alone(self, asking: Sequence[_Player], wanted: str) -> None:
        for player in asking:
            assert player.index is not None
            try:
                player.answer = self._workload.alone(player.index)(wanted)(player.point)
            except Exception as error:  # handed to the solver of that sample, as in a serial run
                player.answer = error
