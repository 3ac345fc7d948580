"""What every way of running a per-sample solver shares: float64 NumPy at the border, and bookkeeping.

The conditions are whole-tensor functions, and only they know which of their args are batched. So one
sample's residual is its row of the whole batch's: no shape is guessed, and a row does not depend on what
stands in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invlayer_core.execution.outcome import Outcome, is_programming_error, message_of, without_frames
from invlayer_core.solvers.contract import BatchProblem, SampleProblem, Solver, SolverResult, Status

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SampleRecord", "resting_rows", "sample_problem", "solve_sample", "to_numpy"]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A private float64 copy on the host."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return array


def resting_rows(y0: Tensor) -> Tensor:
    """What stands in the rows of samples that ask for nothing: their initial guess, made finite."""
    return torch.nan_to_num(y0)


def sample_problem(
    problem: BatchProblem,
    index: int,
    residual: Callable[[np.ndarray], np.ndarray],
    jacobian: Callable[[np.ndarray], np.ndarray],
) -> SampleProblem:
    """System ``index`` of a batch, as a per-sample solver sees it."""
    return SampleProblem(problem.kind, problem.size, index, residual, jacobian)


@final
class SampleRecord:
    """The results of B solves of one system each, kept as they come in."""

    def __init__(self, problem: BatchProblem, y0: Tensor) -> None:
        count = problem.batch
        self.like = y0
        self.rows = torch.full(y0.shape, torch.nan, dtype=torch.float64)
        self.status = torch.full((count,), int(Status.CONVERGED))
        self.iterations = torch.full((count,), -1)
        self.message = [""] * count
        self.aux: list[Mapping[str, Any]] = [{}] * count
        self.errors: list[Exception] = []

    def keep(self, index: int, solve: Callable[[], SolverResult]) -> None:
        """Run ``solve`` for sample ``index``; whatever becomes of it stays with that sample."""
        try:
            result = solve()
        except Exception as error:  # a failing sample is data: kept, reported, and isolated
            self.errors.append(without_frames(error))
            self._fail(index, Status.SOLVER_ERROR, f"{type(error).__name__}: {error}")
            return
        wrong = _what_is_wrong(result, self.rows.shape[-1])
        if wrong:
            self._fail(index, Status.WRONG_SHAPE, wrong)
            return
        self.rows[index] = torch.as_tensor(result.y).detach().to("cpu", torch.float64)
        self.iterations[index] = int(result.iterations)
        self.message[index], self.aux[index] = message_of(result), result.aux
        if not bool(result.success):
            self.status[index] = int(Status.NOT_CONVERGED)

    def _fail(self, index: int, status: Status, message: str) -> None:
        self.status[index], self.message[index] = int(status), message

    def outcome(self) -> Outcome:
        """The outcome of the batch; raises if every sample failed by what must be wrong code."""
        if self.errors and len(self.errors) == len(self.message) and is_programming_error(self.errors[0]):
            raise self.errors[0]
        device = self.like.device
        return Outcome(
            y=self.rows.to(self.like),
            status=self.status.to(device),
            iterations=self.iterations.to(device),
            message=tuple(self.message),
            cause=self.errors[0] if self.errors else None,
            aux=tuple(self.aux),
        )


def _what_is_wrong(result: Any, size: int) -> str:
    """Why a result cannot be used, in one sentence; empty if it can."""
    if not isinstance(result, SolverResult):
        return f"solve() returned {type(result).__name__}; accepted is a SolverResult."
    try:
        row = torch.as_tensor(result.y)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"SolverResult.y is not an array of numbers: {error}"
    if tuple(row.shape) != (size,) or row.is_complex() or row.dtype == torch.bool:
        return f"SolverResult.y has shape {tuple(row.shape)} and dtype {row.dtype}, not real ({size},)."
    for name, convert in (("iterations", int), ("success", bool)):
        value = getattr(result, name)
        try:
            convert(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return f"SolverResult.{name} is {value!r}; accepted is one {convert.__name__}."
    for name, kind in (("message", str), ("aux", Mapping)):
        if not isinstance(getattr(result, name), kind):
            return f"SolverResult.{name} is {getattr(result, name)!r}; accepted is a {kind.__name__}."
    return ""


def solve_sample(
    solver: Solver, problem: SampleProblem, y0: Tensor, options: Mapping[str, Any]
) -> Callable[[], SolverResult]:
    """The solve of one sample, ready to run; the solver gets private copies of guess and options."""
    return lambda: solver.solve(problem, to_numpy(y0), dict(options))
