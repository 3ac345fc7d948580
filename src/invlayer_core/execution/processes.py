"""Run a per-sample solver over a batch in worker processes of our own.

A pool of ``concurrent.futures`` cannot say which sample a worker died of, nor stop a solve that hangs: one
dead worker breaks the whole pool. So the parent talks to each worker by a pipe of its own. A worker gets one
chunk at a time, reports every sample as soon as it is solved, and is killed when one takes too long. What
dies with it is one sample, which gets a second chance; the rest of its chunk goes to a new worker.

Workers are spawned, never forked: torch's threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, final

from invlayer_core.errors import ConditionsError
from invlayer_core.execution.native_threads import core_count, single_native_thread
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord, SampleReport
from invlayer_core.execution.transfer import pack_report, pack_workload, unpack_workload
from invlayer_core.execution.workload import Workload
from invlayer_core.solvers.contract import Status

__all__ = ["run_in_processes"]

_LARGEST = 1024  # samples of a chunk
_PER_WORKER = 4  # chunks, so that uneven ones even out
_CALLED = "batch='processes'"
_GRACE = 1.0  # seconds beyond its timeout that a solve has to notice it by itself


def _serve(connection: Connection) -> None:
    """The life of a worker: chunks in, one report per sample out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with single_native_thread():
        while payload := _receive(connection):
            try:
                workload = unpack_workload(payload)
            except ConditionsError as error:
                connection.send_bytes(pickle.dumps(error))
                continue
            connection.send_bytes(b"")  # it begins
            workload = workload.with_starts()
            for index in workload.todo:
                connection.send_bytes(pack_report(workload.report(index)))


def _receive(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return b""


@final
class _Worker:
    """One process, the rows it is at, and since when."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote,), daemon=True)
        self.process.start()
        remote.close()
        self.rows: deque[int] = deque()
        self.since: float | None = None  # None: it is loading, and no sample's time runs

    def begin(self, workload: Workload, rows: range) -> None:
        self.rows, self.since = deque(rows), None
        self.connection.send_bytes(pack_workload(workload.rows(rows.start, rows.stop), _CALLED))

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.process.close()


@final
class _Pool:
    """Rows in wait, workers, and what they have reported."""

    def __init__(self, workload: Workload, record: SampleRecord, count: int) -> None:
        self.workload, self.record = workload, record
        self.waiting = deque(_chunks(workload.todo, count))
        self.workers: list[_Worker] = []
        self.count = min(count, len(self.waiting))
        self.died: set[int] = set()
        self.failed_to_load = False

    def run(self) -> None:
        try:
            while self.waiting or any(worker.rows for worker in self.workers):
                self._employ()
                self._listen()
                self._stop_late_ones()
        finally:  # also on Ctrl-C: no process is left
            for worker in self.workers:
                worker.end()

    def _employ(self) -> None:
        for worker in [worker for worker in self.workers if not worker.rows]:
            if self.waiting:
                self._begin(worker)
        while self.waiting and len(self.workers) < self.count:
            self.workers.append(_Worker())
            self._begin(self.workers[-1])

    def _begin(self, worker: _Worker) -> None:
        rows = self.waiting.popleft()
        try:
            worker.begin(self.workload, rows)
        except OSError:  # it died while idle; the next round sees that, and hands the rows on
            worker.since = None

    def _listen(self) -> None:
        patience = None if self.workload.limits.timeout is None else 0.05
        ready = wait([worker.connection for worker in self.workers], patience)
        for worker in [worker for worker in self.workers if worker.connection in ready]:
            try:
                message = worker.connection.recv_bytes()
            except (EOFError, OSError):
                self._replace(worker)
            else:
                self._take(worker, message)

    def _take(self, worker: _Worker, message: bytes) -> None:
        if message:
            content = pickle.loads(message)
            if isinstance(content, ConditionsError):
                raise content
            self.record.add(worker.rows.popleft(), content)
            self.failed_to_load = False
        worker.since = time.monotonic()

    def _replace(self, worker: _Worker) -> None:
        """A worker has died: of the sample it was at, which is tried once more and then given up."""
        worker.process.join()
        code, rows, began = worker.process.exitcode, list(worker.rows), worker.since is not None
        self._dismiss(worker)
        if not rows:
            return
        if not began:
            self._load_again(rows, code)
            return
        suspect, *others = rows
        if suspect in self.died:
            message = f"the worker process died twice at this sample, at last with exit code {code}"
            self.record.add(suspect, SampleReport(Status.SOLVER_ERROR, message))
        else:
            self.died.add(suspect)
            self.waiting.append(range(suspect, suspect + 1))
        if others:
            self.waiting.appendleft(range(others[0], others[-1] + 1))

    def _load_again(self, rows: list[int], code: int | None) -> None:
        """No sample is to blame for a worker that dies before it begins; twice is no accident."""
        if self.failed_to_load:
            raise ConditionsError(
                f"{_CALLED}: a worker process died with exit code {code} before it could begin. Accepted are "
                'scripts whose main part stands under if __name__ == "__main__":, as each worker imports the '
                "script, and conditions and solvers that can be imported there; see its output above."
            )
        self.failed_to_load = True
        self.waiting.appendleft(range(rows[0], rows[-1] + 1))

    def _stop_late_ones(self) -> None:
        timeout = self.workload.limits.timeout
        if timeout is None:
            return
        for worker in list(self.workers):
            if worker.rows and worker.since and time.monotonic() > worker.since + timeout + _GRACE:
                late, *others = worker.rows
                self._dismiss(worker)
                message = f"stopped after timeout={timeout:g} seconds, by killing its process"
                self.record.add(late, SampleReport(Status.TIMED_OUT, message))
                if others:
                    self.waiting.appendleft(range(others[0], others[-1] + 1))

    def _dismiss(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.end()


def _chunks(todo: range, workers: int) -> list[range]:
    size = max(1, min(_LARGEST, -(-len(todo) // (workers * _PER_WORKER))))
    return [range(i, min(i + size, todo.stop)) for i in range(todo.start, todo.stop, size)]


def run_in_processes(workload: Workload, done: Callable[[], Any]) -> Outcome:
    """Solve chunks of the batch in worker processes, one for each core.

    The processes live as long as this call: for many calls, pass an executor of your own.

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
    record = SampleRecord(workload.y0, done)
    _Pool(workload, record, core_count()).run()
    return record.outcome("processes")
