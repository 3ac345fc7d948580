"""Run a per-sample solver over a batch, one sample after the other, in float64 NumPy.

The conditions are whole-tensor functions, and only they know which of their args are batched. So one
sample's residual is row i of the whole batch's, with every other row resting at its initial guess: no
shape is guessed, and what the solver of sample i sees does not depend on any other sample's progress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invlayer_core.execution.outcome import Outcome, is_programming_error, message_of
from invlayer_core.solvers.contract import BatchProblem, SampleProblem, Solver, SolverResult, Status

if TYPE_CHECKING:
    import numpy as np

__all__ = ["run_serially"]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """A private float64 copy on the host."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return array


def _sample(problem: BatchProblem, index: int, resting: Tensor) -> SampleProblem:
    """System ``index`` of a batch, as NumPy functions of its own unknowns."""

    def place(y: np.ndarray) -> Tensor:
        row = torch.as_tensor(y, dtype=torch.float64).to(resting).reshape(1, problem.size)
        if problem.batch == 1:
            return row
        rows = resting.clone()
        rows[index : index + 1] = row
        return rows

    def of_row(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda y: _to_numpy(function(place(y))[index])

    return SampleProblem(
        kind=problem.kind,
        size=problem.size,
        index=index,
        residual_function=of_row(problem.residual_function),
        jacobian_function=of_row(problem.jacobian_function),
    )


def _as_row(result: Any, size: int) -> Tensor | str:
    """The solution as a float64 row, or what is wrong with it."""
    if not isinstance(result, SolverResult):
        return f"solve() returned {type(result).__name__}; accepted is a SolverResult."
    try:
        row = torch.as_tensor(result.y)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"SolverResult.y is not an array of numbers: {error}"
    if tuple(row.shape) != (size,) or row.is_complex() or row.dtype == torch.bool:
        return f"SolverResult.y has shape {tuple(row.shape)} and dtype {row.dtype}; accepted is a real ({size},)."
    return row.detach().to("cpu", torch.float64, copy=True)


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
    resting = torch.nan_to_num(y0)  # a NaN guess of one sample must not leak through a reduction in F
    rows = torch.full(y0.shape, torch.nan, dtype=torch.float64)
    status = torch.full((problem.batch,), int(Status.CONVERGED))
    iterations = torch.full((problem.batch,), -1)
    message, aux, errors = [""] * problem.batch, [], []
    for i in range(problem.batch):
        try:
            result = solver.solve(_sample(problem, i, resting), _to_numpy(y0[i]), dict(options))
        except Exception as error:  # a failing sample is data: kept, reported, and isolated
            errors.append(error)
            status[i], message[i] = int(Status.SOLVER_ERROR), f"{type(error).__name__}: {error}"
            aux.append({})
            continue
        row = _as_row(result, problem.size)
        if isinstance(row, str):
            status[i], message[i] = int(Status.WRONG_SHAPE), row
            aux.append({})
            continue
        rows[i], iterations[i], message[i] = row, int(result.iterations), message_of(result)
        aux.append(result.aux)
        if not bool(result.success):
            status[i] = int(Status.NOT_CONVERGED)
    if len(errors) == problem.batch and errors and is_programming_error(errors[0]):
        raise errors[0]
    return Outcome(
        rows.to(y0), status.to(y0.device), iterations.to(y0.device), tuple(message),
        errors[0] if errors else None, tuple(aux),
    )  # fmt: skip
