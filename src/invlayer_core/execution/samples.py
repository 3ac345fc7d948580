"""What every way of running a per-sample solver shares: float64 NumPy at the border, and bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invlayer_core.execution.limits import SampleTimeout
from invlayer_core.execution.outcome import Outcome, is_programming_error, message_of, without_frames
from invlayer_core.solvers.contract import SolverResult, Status

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Reports", "SampleRecord", "SampleReport", "report_of", "resting_rows", "to_numpy"]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A private float64 copy on the host."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return array


def resting_rows(y0: Tensor) -> Tensor:
    """What stands in the rows of samples that ask for nothing: their initial guess, made finite."""
    return torch.nan_to_num(y0)


@final
@dataclass(frozen=True)
class SampleReport:
    """What became of the solve of one sample, in a form that travels between processes.

    Attributes
    ----------
    status : Status
        The solver's own claim, or how the solve failed.
    message : str
    y : ndarray of float64, shape ``(n,)``, or None if there is none
    iterations : int
    aux : mapping
    error : Exception or None
        What the solve raised, without frames.
    """

    status: Status
    message: str
    y: np.ndarray | None = None
    iterations: int = -1
    aux: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def report_of(solve: Callable[[], SolverResult], size: int) -> SampleReport:
    """Run the solve of one sample; whatever becomes of it stays with that sample."""
    try:
        result = solve()
    except SampleTimeout as timeout:
        return SampleReport(Status.TIMED_OUT, str(timeout))
    except Exception as error:  # a failing sample is data: kept, reported, and isolated
        message = f"{type(error).__name__}: {error}"
        return SampleReport(Status.SOLVER_ERROR, message, error=without_frames(error))
    wrong = _what_is_wrong(result, size)
    if wrong:
        return SampleReport(Status.WRONG_SHAPE, wrong)
    y: Any = result.y
    return SampleReport(
        status=_claimed(result),
        message=message_of(result),
        y=y.copy() if _is_vector(y, size) else to_numpy(torch.as_tensor(y)),
        iterations=int(result.iterations),
        aux=result.aux,
    )


def _is_vector(y: Any, size: int) -> bool:
    """Whether y is float64 NumPy ``(n,)``, as nearly always."""
    return getattr(y, "dtype", None) == "float64" and y.shape == (size,)


class SampleRecord:
    """The results of B solves of one system each, kept as they come in.

    Parameters
    ----------
    y0 : Tensor of shape ``(B, n)``
    done : callable, optional
        Called whenever a sample is done.
    """

    def __init__(self, y0: Tensor, done: Callable[[], Any] = lambda: None) -> None:
        count = y0.shape[0]
        self.like = y0
        self.rows = torch.full(y0.shape, torch.nan, dtype=torch.float64).numpy()
        self.status = [int(Status.CONVERGED)] * count
        self.iterations = [-1] * count
        self.message = [""] * count
        self.aux: list[Mapping[str, Any]] = [{}] * count
        self.errors: dict[int, Exception] = {}
        self._done = done

    def keep(self, index: int, solve: Callable[[], SolverResult]) -> None:
        """Run ``solve`` for sample ``index``; whatever becomes of it stays with that sample."""
        self.add(index, report_of(solve, self.rows.shape[-1]))

    def add(self, index: int, report: SampleReport) -> None:
        """Keep what became of sample ``index``."""
        if report.y is not None:
            self.rows[index] = report.y
        if report.error is not None:
            self.errors[index] = report.error
        self.status[index], self.iterations[index] = int(report.status), report.iterations
        self.message[index], self.aux[index] = report.message, report.aux
        self._done()

    def outcome(self, how: str) -> Outcome:
        """The outcome of the batch; raises if every sample failed by what must be wrong code."""
        cause = self.errors[min(self.errors)] if self.errors else None
        if cause is not None and len(self.errors) == len(self.message) and is_programming_error(cause):
            raise cause
        device = self.like.device
        return Outcome(
            y=torch.from_numpy(self.rows).to(self.like),
            status=torch.tensor(self.status, dtype=torch.int64, device=device),
            iterations=torch.tensor(self.iterations, dtype=torch.int64, device=device),
            message=tuple(self.message),
            cause=cause,
            aux=tuple(self.aux),
            how=how,
        )


@final
class Reports(SampleRecord):
    """The reports themselves, for another process."""

    def __init__(self, y0: Tensor) -> None:
        super().__init__(y0[:0])
        self.reports: dict[int, SampleReport] = {}

    def add(self, index: int, report: SampleReport) -> None:
        self.reports[index] = report


def _is_as_usual(result: Any, size: int) -> bool:
    """Whether there is nothing to convert: a quick look, as results come by the thousand."""
    return (
        type(result) is SolverResult
        and type(result.success) is bool
        and type(result.iterations) is int
        and type(result.message) is str
        and type(result.aux) is dict
        and _is_vector(result.y, size)
    )


def _claimed(result: SolverResult) -> Status:
    if result.no_solution:
        return Status.NO_SOLUTION
    return Status.CONVERGED if bool(result.success) else Status.NOT_CONVERGED


def _what_is_wrong(result: Any, size: int) -> str:
    """Why a result cannot be used, in one sentence; empty if it can."""
    if _is_as_usual(result, size):
        return ""
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
