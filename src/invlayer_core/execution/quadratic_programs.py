"""Quadratic programs on the host: one by one in float64 NumPy, as a per-sample solver takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Size, Tensor

from invlayer_core.conditions.quadratic import ARGUMENTS, QuadraticLayout, QuadraticProgram
from invlayer_core.execution.limits import NO_LIMITS, Limits
from invlayer_core.execution.samples import SampleReport, report_of
from invlayer_core.matrices import SparseForm
from invlayer_core.solvers.contract import Solver, SolverResult, Status
from invlayer_core.solvers.quadratic import CoordinateMatrix, QuadraticProblem

if TYPE_CHECKING:
    import numpy as np

__all__ = ["QuadraticWorkload", "arguments_on_host", "not_called", "unusable", "unusable_samples"]

Rows = Callable[[int], Any]


@final
@dataclass(frozen=True, eq=False)
class QuadraticWorkload:
    """B quadratic programs in NumPy, with the per-sample solver that is to solve them."""

    name: str
    solver: Solver
    options: Mapping[str, Any]
    size: int
    arguments: Mapping[str, Rows]
    y0: Tensor
    limits: Limits = NO_LIMITS
    todo: range = range(0)

    def problem(self, index: int) -> QuadraticProblem:
        """One program."""
        return QuadraticProblem(index, **{name: rows(index) for name, rows in self.arguments.items()})

    def report(self, index: int, check: Callable[[], Any] = lambda: None) -> SampleReport:
        """Solve one program; what holds NaN is not given to any solver."""
        problem = self.problem(index)
        wrong = unusable(problem)
        if wrong:
            return not_called(wrong)
        check()
        return report_of(lambda: self._solve(problem, index), int(self.y0.shape[-1]))

    def _solve(self, problem: QuadraticProblem, index: int) -> SolverResult:
        return self.solver.solve(problem, self.guess(index), dict(self.options))

    def guess(self, index: int) -> np.ndarray:
        """The initial x of one program; zeros if there is none."""
        guess: np.ndarray = self.y0[index, : self.size].to("cpu", torch.float64, copy=True).numpy()
        return guess


def not_called(wrong: str) -> SampleReport:
    """The report of a program that no solver was given."""
    return SampleReport(Status.NOT_CONVERGED, f"{wrong}; the solver was not called")


def unusable(problem: QuadraticProblem) -> str:
    """Which argument holds what no solver can take; empty if none does."""
    for name in ARGUMENTS:
        value = getattr(problem, name)
        if value is None:
            continue
        numbers = value.values if isinstance(value, CoordinateMatrix) else value
        if name in _ONE_SIDED:  # infinity on one side bounds nothing
            fine = not ((numbers != numbers) | (numbers == _ONE_SIDED[name])).any()
        else:  # a sum is finite if all terms are; if it only overflows, the solver may try
            fine = math.isfinite(numbers.sum()) or bool(torch.from_numpy(numbers).isfinite().all())
        if not fine:
            return f"{name} holds NaN or infinity"
    return ""


def unusable_samples(program: QuadraticProgram, batch: Size) -> Tensor:
    """The same for a batch in torch: which samples, ``(B,)``."""
    bad = torch.zeros(batch, dtype=torch.bool, device=program.tensors["q"].device)
    for name, tensor in program.tensors.items():
        wrong = tensor.isnan() | (tensor == _ONE_SIDED[name]) if name in _ONE_SIDED else ~tensor.isfinite()
        bad = bad | wrong.flatten(tensor.ndim - program.layout.event_dims(name)).any(-1)
    return bad.reshape(-1)


_ONE_SIDED: Final = {"h": -math.inf, "ub": -math.inf, "lb": math.inf}


def arguments_on_host(layout: QuadraticLayout, program: QuadraticProgram, batch: Size) -> dict[str, Rows]:
    """Every argument on the host, as a function of the sample's number."""
    return {name: _host_rows(layout, program, name, batch) for name in ARGUMENTS}


def _host_rows(layout: QuadraticLayout, program: QuadraticProgram, name: str, batch: Size) -> Rows:
    if name not in program.tensors:
        return lambda _: None
    tensor, form = program.tensors[name], layout.forms.get(name)
    event_dims = layout.event_dims(name)
    event = tensor.shape[tensor.ndim - event_dims :]
    if name == "P" and not isinstance(form, SparseForm):
        tensor = 0.5 * (tensor + tensor.mT)
    shared = tensor.numel() == event.numel()
    tensor = tensor.reshape(1, *event) if shared else tensor.expand(*batch, *event).reshape(-1, *event)
    array = tensor.to("cpu", torch.float64).numpy()
    if isinstance(form, SparseForm):
        assemble = _assembler(form, symmetric=name == "P")
        return lambda index: assemble(array[0 if shared else index])
    return lambda index: array[0 if shared else index].copy()  # some solvers write into what they are given


def _assembler(form: SparseForm, *, symmetric: bool) -> Callable[[np.ndarray], CoordinateMatrix]:
    """From values on the pattern to a matrix; to ½ (P + Pᵀ) for P."""
    row, column, shape = form.row.cpu(), form.column.cpu(), (form.rows, form.columns)
    if not symmetric or torch.equal(row, column):
        return lambda values: CoordinateMatrix(shape, row.numpy(), column.numpy(), values.copy())
    rows, columns = torch.cat([row, column]).numpy(), torch.cat([column, row]).numpy()

    def halves(values: np.ndarray) -> CoordinateMatrix:
        both: np.ndarray = torch.tensor(values).mul_(0.5).repeat(2).numpy()
        return CoordinateMatrix(shape, rows, columns, both)

    return halves
