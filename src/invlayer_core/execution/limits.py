"""What a run may take: seconds per sample, someone else's workers, and a bar that shows how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, final

from invlayer_core.errors import ConditionsError

__all__ = ["NO_LIMITS", "Deadline", "Limits", "SampleTimeout", "progress_bar"]


@final
class SampleTimeout(BaseException):
    """Unwinds the solve of a sample whose time is up; not an Exception, so that no solver keeps it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"stopped after timeout={seconds:g} seconds")


@final
@dataclass(frozen=True)
class Limits:
    """How long, where and how visibly a per-sample solver runs.

    Parameters
    ----------
    timeout : float, optional
        Seconds that the solve of one sample may take.
    executor : concurrent.futures.Executor, optional
        Where chunks of samples are solved.
    progress : bool
        Whether a bar counts the samples that are done.

    Raises
    ------
    ConditionsError
        If one of them is something else.
    """

    timeout: float | None = None
    executor: Executor | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None and not _is_duration(self.timeout):
            raise ConditionsError(f"timeout={self.timeout!r}: accepted is a number of seconds > 0, or None.")
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise ConditionsError(
                f"executor={self.executor!r}: accepted is a concurrent.futures.Executor, such as "
                "ProcessPoolExecutor() or a Dask client's get_executor()."
            )
        if not isinstance(self.progress, bool):
            raise ConditionsError(f"progress={self.progress!r}: accepted are True and False.")


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


NO_LIMITS = Limits()


@final
class Deadline:
    """The moment at which one solve, begun now, has to end."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Stop the solve from which this is called, if its time is up.

        Raises
        ------
        SampleTimeout
        """
        if self._seconds is not None and time.monotonic() > self._end:
            raise SampleTimeout(self._seconds)


@contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Callable[[], Any]]:
    """A function to call whenever one of ``total`` samples is done.

    Raises
    ------
    ConditionsError
        If a bar is asked for, and tqdm is not installed.
    """
    if not show:
        yield lambda: None
        return
    try:
        tqdm = import_module("tqdm.auto").tqdm
    except ImportError:
        raise ConditionsError(
            "progress=True needs tqdm, which is not installed: pip install tqdm, or leave progress out."
        ) from None
    quiet = type("Bar", (tqdm,), {"monitor_interval": 0})  # tqdm's own thread would outlive the call
    with quiet(total=total, unit="sample") as bar:
        yield bar.update
