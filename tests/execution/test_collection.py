"""Lockstep beside a sampling profiler and a busy garbage collector, which hang Python 3.11 if they meet."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from invlayer_core.execution.collection import no_collection

WATCHED = """
import gc, os, sys, threading, time
from tests.execution.systems import Relaxation, batch, cubic
import invlayer_core as inv

def watch():
    while True:
        sys._current_frames()

y0, _ = batch(60)
gc.set_threshold(5, 1, 1)
gc.callbacks.append(lambda phase, info: time.sleep(0))  # gives way, as any callback in Python may
threading.Thread(target=watch, daemon=True).start()
for _ in range(3):  # from a root: many threads, and one round
    assert inv.root(cubic, y0, y0, solver=Relaxation(), batch="lockstep").equal(y0)
os._exit(0)  # the interpreter's own end would meet the profiler, too
"""


@pytest.mark.slow
def test_lockstep_ends_while_a_profiler_watches() -> None:
    # In a process of its own: what hangs there holds Python's lock, and no timeout would reach it.
    subprocess.run([sys.executable, "-c", WATCHED], cwd=Path(__file__).parents[2], timeout=100, check=True)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="collections do no harm there")
def test_waits_for_a_collection_that_is_under_way() -> None:
    under_way, over = threading.Event(), threading.Event()

    def linger(phase: str, _info: dict[str, int]) -> None:
        if threading.current_thread() is collector:
            under_way.set()
            time.sleep(0.05)
            if phase == "stop":
                over.set()

    collector = threading.Thread(target=gc.collect)
    gc.callbacks.append(linger)
    try:
        collector.start()
        assert under_way.wait(10)
        with no_collection():
            assert over.is_set()
            assert not gc.isenabled()
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(linger)
        collector.join()


def test_leaves_a_collector_off_that_was_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
