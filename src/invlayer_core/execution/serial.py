"""Run a per-sample solver over a batch, one sample after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
from invlayer_core.solvers.contract import BatchProblem, SampleProblem, Solver

if TYPE_CHECKING:
    import numpy as np

__all__ = ["alone", "run_serially"]


def alone(problem: BatchProblem, index: int, resting: Tensor) -> SampleProblem:
    """System ``index`` with every other row of the batch at rest."""

    def place(y: np.ndarray) -> Tensor:
        row = torch.as_tensor(y, dtype=torch.float64).to(resting).reshape(1, problem.size)
        if problem.batch == 1:
            return row
        rows = resting.clone()
        rows[index : index + 1] = row
        return rows

    def of_row(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda y: to_numpy(function(place(y))[index])

    return sample_problem(
        problem, index, of_row(problem.residual_function), of_row(problem.jacobian_function)
    )


def run_serially(solver: Solver, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> Outcome:
    """Solve every sample alone; a failing one leaves a NaN row, a status and a message.

    Parameters
    ----------
    solver : Solver
        A per-sample one.
    problem : BatchProblem
    y0 : Tensor of shape ``(B, n)``
    options : mapping
        Handed to every ``solve`` as a fresh dict.
    """
    resting = resting_rows(y0)
    record = SampleRecord(problem, y0)
    for i in range(problem.batch):
        record.keep(i, solve_sample(solver, alone(problem, i, resting), y0[i], options))
    return record.outcome()
