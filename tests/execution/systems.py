"""Conditions and solvers for every way to run a batch; importable by name, as spawned processes need it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv

SICK = 2  # the sample at which a fault strikes
FLOAT = torch.float64


def cubic(y: Tensor, a: Tensor) -> Tensor:
    """Element by element, so that no rounding depends on the batch."""
    return y + 0.1 * y * y * y - a


def weighted(y: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """``a`` has one row per sample, ``weight`` (n,) serves all."""
    return y + weight * y * y * y - a


def nested(y: Tensor, a: Tensor) -> Tensor:
    """Solves another layer at every evaluation."""
    return y + 0.1 * inv.root(cubic, torch.zeros_like(y), y, solver=Relaxation(), batch="lockstep") - a


def batch(count: int = 7, size: int = 2) -> tuple[Tensor, Tensor]:
    """Starts and args."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, size, generator=generator, dtype=FLOAT)
    return torch.zeros(count, size, dtype=FLOAT), a


@dataclass(frozen=True)
class Relaxation(inv.Solver):
    """Damped fixed-point iteration in NumPy, as opaque as a solver gets, with a fault at sample ``SICK``."""

    fault: str = ""
    marker: str = ""

    def solve(self, problem: Any, y0: np.ndarray, options: Any) -> inv.SolverResult:
        if problem.index == SICK and self.fault:
            return getattr(self, self.fault)(problem, y0)
        return self.relax(problem, y0)

    def relax(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        for step in range(200):
            residual = problem.residual(y)
            if np.abs(residual).max() < 1e-13:
                return inv.SolverResult(y, True, step, "done", {"steps": step})
            y = y - 0.5 * residual
        return inv.SolverResult(y, False, 200, "ran out of steps")

    def throws(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        problem.residual(y)
        raise FloatingPointError("overflow on the way")

    def loops(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        while True:
            try:
                problem.residual(y)
            except Exception:  # not even this may keep it alive
                continue

    def hangs(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        while True:
            time.sleep(0.01)

    def gives_nan(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        return inv.SolverResult(np.full_like(y, np.nan))

    def gives_wrong_shape(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        return inv.SolverResult(np.zeros(len(y) + 1))

    def dies(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        os._exit(7)

    def dies_once(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os._exit(7)
        return self.relax(problem, y)

    def is_killed_once(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.relax(problem, y)

    def raises_what_cannot_travel(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        raise Unpicklable(open(os.devnull))  # noqa: SIM115

    def keeps_a_file(self, problem: Any, y: np.ndarray) -> inv.SolverResult:
        result = self.relax(problem, y)
        return inv.SolverResult(result.y, aux={"file": open(os.devnull)})


class Unpicklable(Exception):  # noqa: N818
    def __init__(self, handle: Any) -> None:
        super().__init__("holds a file")
        self.handle = handle
        handle.close()

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle this")
