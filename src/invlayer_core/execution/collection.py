"""Threads begin and end without Python's garbage collector: in Python 3.11 the two may hang for good.

There ``sys._current_frames`` keeps the runtime's lock of threads while it allocates, and an allocation may
collect garbage, which gives Python's lock away in the middle. A thread that begins or ends then waits for the
lock of threads with Python's lock in its hand, and nobody moves again (CPython issue gh-106883; from 3.12 on
an allocation collects nothing). Sampling profilers call that function all the time, Dask's on every worker.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collection"]


@contextmanager
def no_collection() -> Iterator[None]:
    """Begin no garbage collection in this block, and have none under way, where that matters."""
    if sys.version_info >= (3, 12) or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        _outlast_the_one_under_way()
        yield
    finally:
        gc.enable()


def _outlast_the_one_under_way() -> None:
    # One collection at a time: while another thread's is under way, one that is asked for does nothing.
    own, ran = threading.get_ident(), []

    def notice(phase: str, _info: dict[str, int]) -> None:
        if threading.get_ident() == own:
            ran.append(phase)

    gc.callbacks.append(notice)
    try:
        while True:
            gc.collect(0)
            if ran:
                return
            time.sleep(1e-4)  # gives Python's lock to the thread that collects
    finally:
        gc.callbacks.remove(notice)
