"""A CasADi rootfinder Function as a solver of its own conditions, in CasADi from start to end.

The samples go through ``buffer()`` one by one: ``map`` would report no status, and one sample that raises
would take the others with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import casadi as ca
import numpy as np
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import ThreadFunctions
from invlayer_casadi.rootfinding.registered import iterations_of
from invlayer_core import BatchProblem, Solver, SolverResult

__all__ = ["NativeRootfinder"]


@final
class NativeRootfinder(Solver):
    """A rootfinder Function; ``options={"parameters": tuple}`` has a tensor ``(*batch, nnz)`` for each input.

    Parameters
    ----------
    function : casadi.Function
        Made by ``casadi.rootfinder``.
    unknown, solution : int
        Which input is the guess, which output the root.
    threads : int
        How many samples are solved at a time, each thread with its own copy.
    """

    batched = True

    def __init__(self, function: ca.Function, unknown: int, solution: int, threads: int = 1) -> None:
        self.function, self.unknown, self.solution, self.threads = function, unknown, solution, threads
        self._functions = ThreadFunctions(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeRootfinder, (self.function, self.unknown, self.solution, self.threads)

    @property
    def label(self) -> str:
        return f"CasADi's {self.function.class_name()} {self.function.name()!r}"

    def solve(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        """Find the B roots; success, message and iterations are CasADi's, for each sample."""
        inputs = [_rows(tensor, problem.batch) for tensor in options["parameters"]]
        inputs.insert(self.unknown, _rows(y0, problem.batch))
        y = np.full((problem.batch, problem.size), np.nan)
        reports: list[tuple[bool, int, str]] = [(False, -1, "")] * problem.batch

        def solve_rows(start: int) -> None:
            for i in range(start, problem.batch, self.threads):
                reports[i] = self._solve_one([rows[i] for rows in inputs], y[i])

        if self.threads == 1:
            solve_rows(0)
        else:
            with ThreadPoolExecutor(self.threads, "invlayer-casadi") as pool:
                list(pool.map(solve_rows, range(self.threads)))
        return SolverResult(
            y=torch.from_numpy(y).to(y0),
            success=torch.tensor([report[0] for report in reports], dtype=torch.bool),
            iterations=torch.tensor([report[1] for report in reports], dtype=torch.int64),
            message=tuple(report[2] for report in reports),
        )

    def _solve_one(self, inputs: list[np.ndarray], y: np.ndarray) -> tuple[bool, int, str]:
        outputs = [np.empty(0)] * self.function.n_out()
        outputs[self.solution] = y
        with self._functions.exclusive():
            buffer = self._functions.buffer(1)
            try:
                buffer(inputs, outputs)
            except RuntimeError as error:  # kinsol raises
                return False, -1, str(error).strip()
            stats = buffer.stats()
        message = str(stats.get("return_status", self.function.class_name()))
        return bool(stats.get("success", True)), iterations_of(stats), message


def _rows(tensor: Tensor, batch: int) -> np.ndarray:
    """``(B, nnz)`` in float64 NumPy, contiguous."""
    array: np.ndarray = tensor.detach().reshape(batch, -1).to("cpu", torch.float64).contiguous().numpy()
    return array
