"""Run a per-sample method once, on the block-diagonal system of the whole batch.

To a Newton–Krylov method B systems of n unknowns are one system of B·n unknowns whose Jacobian has blocks:
it never forms that Jacobian, and each product with it is one evaluation of F for all samples (Knoll & Keyes,
J. Comput. Phys. 193 (2004) 357). Its iterates are not those of the samples alone, its solutions are, to its
tolerance. Samples that hold the others up are taken out: whatever is unsolved in the end is solved alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invlayer_core.execution.limits import Deadline
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord, SampleReport, report_of, resting_rows, to_numpy
from invlayer_core.execution.workload import Workload
from invlayer_core.solvers.contract import SampleProblem, Status

if TYPE_CHECKING:
    import numpy as np

__all__ = ["run_stacked"]

_PATIENCE = (
    400  # evaluations without progress after which the stack is given up; 5 per sample if that is more
)


@final
class _Stuck(Exception):  # noqa: N818 (no error: the samples go on alone)
    """The stack makes no progress any more."""


@final
class _Stack:
    """The residual of all samples as one vector, with the best iterate of each sample."""

    def __init__(self, workload: Workload) -> None:
        self.problem, self.rest = workload.problem(), resting_rows(workload.y0)
        residual = self.problem.residual(self.rest)
        self.sound = residual.isfinite().all(-1, keepdim=True)  # the others would spoil every step
        self.best, self.error = self.rest.clone(), _largest(residual)
        self.tolerance = torch.finfo(self.rest.dtype).eps ** (1 / 3)  # what Newton–Krylov codes stop at
        self.checked = Deadline(_total(workload))
        self.since, self.record = 0, (math.inf, math.inf)
        self.patience = max(
            _PATIENCE, 5 * self.rest.shape[0]
        )  # Newton–Krylov often waits long before it leaps

    def residual(self, y: np.ndarray) -> np.ndarray:
        self.checked.check()
        rows = torch.as_tensor(y, dtype=torch.float64).to(self.rest).reshape(self.rest.shape)
        rows = torch.where(self.sound, rows, self.rest)
        residual = torch.where(self.sound, self.problem.residual(rows), 0.0)
        self._keep_best(rows, residual)
        return to_numpy(residual.reshape(-1))

    def _keep_best(self, rows: Tensor, residual: Tensor) -> None:
        error = _largest(residual)
        better = (error < self.error) & self.sound.squeeze(-1)
        self.best = torch.where(better.unsqueeze(-1), rows, self.best)
        self.error = torch.where(better, error, self.error)
        open_errors = self.error[self.unsolved() & self.sound.squeeze(-1)]
        state = (float(open_errors.numel()), float(open_errors.sum()))
        self.since = 0 if state[0] < self.record[0] or state[1] < 0.9 * self.record[1] else self.since + 1
        self.record = state if self.since == 0 else self.record
        if self.since > self.patience:
            raise _Stuck(f"no progress in {self.patience} evaluations")

    def unsolved(self) -> Tensor:
        """Which samples have not been near a root yet."""
        return ~(self.error <= self.tolerance)


def _largest(residual: Tensor) -> Tensor:
    return residual.abs().amax(-1)


def _total(workload: Workload) -> float | None:
    seconds = workload.limits.timeout
    return None if seconds is None else seconds * len(workload.todo)


def run_stacked(workload: Workload, done: Callable[[], Any]) -> Outcome:
    """Solve all samples as one system, then alone those that are left.

    Parameters
    ----------
    workload : Workload
        Of a solver that is stackable with its options (``Solver.is_stackable``).
    done : callable
        Called whenever a sample is done.
    """
    record, stack = SampleRecord(workload.y0, done), _Stack(workload)
    whole = _solve_whole(workload, stack)
    if whole.status is Status.CONVERGED and whole.y is not None:
        solution = torch.from_numpy(whole.y).to(stack.rest).reshape(stack.rest.shape)
        left = ~stack.sound.squeeze(-1)
    else:
        solution, left = stack.best, stack.unsolved()
    values, message = to_numpy(solution), whole.message if not bool(left.any()) else ""
    for index, alone in enumerate(left.tolist()):
        if alone:
            record.add(index, workload.report(index))
        else:
            report = SampleReport(Status.CONVERGED, message, values[index], whole.iterations, whole.aux)
            record.add(index, report)
    return record.outcome("stacked")


def _solve_whole(workload: Workload, stack: _Stack) -> SampleReport:
    size = workload.y0.numel()
    problem = SampleProblem(workload.kind, size, 0, stack.residual, _refuse)
    start = to_numpy(stack.rest.reshape(-1))
    return report_of(lambda: workload.solver.solve(problem, start, workload.options_of(0)), size)


def _refuse(_y: np.ndarray) -> np.ndarray:
    raise AssertionError("a stackable method asks for no Jacobian")
