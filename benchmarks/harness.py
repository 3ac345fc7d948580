"""Interleaved timing of several cases on one thread, printed as ratios to the first of them."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402 (the number of threads is read at import)

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

__all__ = ["After", "compare", "options"]


@dataclass(frozen=True)
class After:
    """A case of which only the last part is timed: ``run`` of what ``prepare`` has made, anew each time."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


Case = Callable[[], object] | After


def options() -> argparse.Namespace:
    """``--quick`` runs each case a few times only, to see that everything works."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def _seconds(case: Case, calls: int) -> float:
    """CPU seconds of so many calls."""
    if isinstance(case, After):
        total = 0.0
        for _ in range(calls):
            prepared = case.prepare()
            began = time.process_time()
            case.run(prepared)
            total += time.process_time() - began
        return total
    began = time.process_time()
    for _ in range(calls):
        case()
    return time.process_time() - began


def _calls_per_turn(case: Case, target: float) -> int:
    _seconds(case, 1)
    began = time.process_time()
    _seconds(case, 1)  # with what is not timed: a turn should not take long
    return max(1, min(500, int(target / max(time.process_time() - began, 1e-7))))


def measure(cases: Mapping[str, Case], *, quick: bool = False) -> dict[str, float]:
    """Median CPU seconds per call of every case; cases take turns, every second round backwards."""
    rounds, target = (2, 0.001) if quick else (15, 0.02)
    began = time.process_time()
    calls = {name: _calls_per_turn(case, target) for name, case in cases.items()}
    if time.process_time() - began > 2:  # cases of a second each: an hour tells no more than a minute
        rounds = min(rounds, 5)
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            times[name].append(_seconds(cases[name], calls[name]) / calls[name])
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def compare(title: str, cases: Mapping[str, Case], *, quick: bool = False) -> dict[str, float]:
    """Measure and print one table; returns the ratios to the first case."""
    seconds = measure(cases, quick=quick)
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:44s} {value * 1e3:10.4f} ms   x {value / first:8.2f}")
    return {name: value / first for name, value in seconds.items()}
