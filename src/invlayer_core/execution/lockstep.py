"""Run B instances of a per-sample solver so that each round of their calls of F is one batched call.

Every sample's solve runs in a thread of its own, and exactly one thread runs at any time: it holds the
baton. When its solver asks for F (or J), the thread leaves the request and hands the baton back. Once
every live solver waits, the conductor answers all requests by *one* evaluation of the batch, and the
next round begins. Torch is only ever called by the conductor, the thread that the user called from.

Threads and not greenlets: MINPACK and LSODA keep C and Fortran frames on the stack while they call back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import (
    SampleRecord,
    resting_rows,
    sample_problem,
    solve_sample,
    to_numpy,
)
from invlayer_core.execution.serial import alone
from invlayer_core.solvers.contract import BatchProblem, SampleProblem, Solver

if TYPE_CHECKING:
    import numpy as np

__all__ = ["run_in_lockstep"]

_THREADS = 256  # solves at once; larger batches go in chunks

Wanted = Literal["residual", "jacobian"]


@final
class _Cancelled(BaseException):
    """Unwinds a solver whose batch is being abandoned; not an Exception, so that no solver keeps it."""


@final
class _Player:
    """One solver in its thread, running only while it holds the baton."""

    def __init__(self, index: int, play: Callable[[_Player], None]) -> None:
        self.index = index
        self.request: tuple[Wanted, np.ndarray] | None = None
        self.answer: np.ndarray | Exception | None = None
        self.cancelled = False
        self.failure: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(play,), daemon=True)
        self._thread.start()

    def _run(self, play: Callable[[_Player], None]) -> None:
        self._go.acquire()
        try:
            if not self.cancelled:
                play(self)
        except _Cancelled:
            pass
        except BaseException as failure:  # not of the sample (those are kept): the conductor raises it
            self.failure = failure
        finally:
            self.request = None
            self._back.release()

    def ask(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        """Called by the solver: leave a request, hand the baton back, and wait for the answer."""
        self.request = (wanted, y)
        self._back.release()
        self._go.acquire()
        if self.cancelled:
            raise _Cancelled
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def take_turn(self) -> bool:
        """Called by the conductor: let it run to its next request; False once it has finished."""
        self._go.release()
        self._back.acquire()
        if self.request is not None:
            return True
        self._thread.join()
        if self.failure is not None and not self.cancelled:
            raise self.failure
        return False

    def cancel(self) -> None:
        """End it where it waits, or at its next request."""
        self.cancelled = True
        self._go.release()
        self._thread.join()


def run_in_lockstep(solver: Solver, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> Outcome:
    """Solve all samples at once; same results as one after the other, with far fewer calls of F.

    Parameters
    ----------
    solver : Solver
        A per-sample one that several threads may use at once (``SolverSpec.thread_safe``).
    problem, y0, options
        As in ``run_serially``.
    """
    record = SampleRecord(problem, y0)
    resting = resting_rows(y0)

    def play(player: _Player) -> None:
        sample = _sample_of(problem, player)
        record.keep(player.index, solve_sample(solver, sample, y0[player.index], options))

    for start in range(0, problem.batch, _THREADS):
        players = [_Player(i, play) for i in range(start, min(start + _THREADS, problem.batch))]
        _conduct(players, problem, resting)
    return record.outcome()


def _sample_of(problem: BatchProblem, player: _Player) -> SampleProblem:
    return sample_problem(
        problem,
        player.index,
        lambda y: player.ask("residual", y),
        lambda y: player.ask("jacobian", y),
    )


def _conduct(players: Sequence[_Player], problem: BatchProblem, resting: Tensor) -> None:
    """Rounds of turns and answers, until every player has finished."""
    live = list(players)
    try:
        while live:
            live = [player for player in live if player.take_turn()]
            for wanted in ("residual", "jacobian"):
                asking = [p for p in live if p.request is not None and p.request[0] == wanted]
                if asking:
                    _answer(asking, wanted, problem, resting)
    finally:  # Ctrl-C, or a failure of the conductor itself: leave no thread behind
        for player in live:
            player.cancel()


def _answer(asking: Sequence[_Player], wanted: str, problem: BatchProblem, resting: Tensor) -> None:
    """One evaluation for all who ask; one each, only if that raises, to find out whose it was."""
    function = problem.residual if wanted == "residual" else problem.jacobian
    try:
        rows = resting.clone()
        index = torch.tensor([player.index for player in asking], device=rows.device)
        rows[index] = _stack(asking, problem.size).to(rows)
        values = to_numpy(function(rows)[index])
    except Exception:
        _answer_alone(asking, wanted, problem, resting)
        return
    for player, value in zip(asking, values, strict=True):
        player.answer = value.copy()  # the solver may overwrite what it is given


def _stack(asking: Sequence[_Player], size: int) -> Tensor:
    requests = (
        torch.as_tensor(player.request[1], dtype=torch.float64) for player in asking if player.request
    )
    return torch.stack([request.reshape(size) for request in requests])


def _answer_alone(asking: Sequence[_Player], wanted: str, problem: BatchProblem, resting: Tensor) -> None:
    for player in asking:
        assert player.request is not None
        sample = alone(problem, player.index, resting)
        try:
            y = player.request[1]
            player.answer = sample.residual(y) if wanted == "residual" else sample.jacobian(y)
        except Exception as error:  # handed to the solver of that sample, as in a serial run
            player.answer = error
