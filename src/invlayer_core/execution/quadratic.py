"""The forward solve of quadratic programs by a registered solver: matrices cross the border, no F does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Size, Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.quadratic import ARGUMENTS, QuadraticLayout, QuadraticProgram
from invlayer_core.execution.batched import run_batched
from invlayer_core.execution.forward import Forward
from invlayer_core.execution.limits import NO_LIMITS, Limits, progress_bar
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.plan import BatchMode
from invlayer_core.execution.program_pool import own_processes, run_on_pool
from invlayer_core.execution.samples import SampleRecord, SampleReport, report_of
from invlayer_core.execution.threads import run_in_threads
from invlayer_core.matrices import SparseForm
from invlayer_core.solvers.contract import Solver, SolverResult, Status
from invlayer_core.solvers.quadratic import BatchQuadraticProblem, CoordinateMatrix, QuadraticProblem

if TYPE_CHECKING:
    import numpy as np

__all__ = ["QuadraticForward"]


@final
@dataclass(frozen=True, eq=False)
class QuadraticForward(Forward):
    """A registered solver on quadratic programs; tensors are θ in the order of the layout, then the guess.

    Attributes
    ----------
    name : str
    solver : Solver
    layout : QuadraticLayout
    batch : torch.Size
        The batch dims of the solution.
    asked : BatchMode
    thread_safe : bool
    limits : Limits
    options : mapping
        The user's options.
    """

    name: str
    solver: Solver
    layout: QuadraticLayout
    batch: Size
    asked: BatchMode
    thread_safe: bool
    limits: Limits
    options: Mapping[str, Any]

    @property
    def how(self) -> str:  # type: ignore[override]
        return "batched" if self.solver.batched else self.asked

    @property
    def event_dims(self) -> int:  # type: ignore[override]
        return 1

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        split = len(self.layout.names)
        program = self.layout.program(tensors[:split])
        concave = _not_convex(program, self.batch)
        guess = self._guess(tensors[split:], program.tensors["q"])
        if self.solver.batched:
            outcome = self._run_batched(program, guess)
        else:
            outcome = self._run_samples(program, guess)
        if concave is not None:
            outcome = _without(outcome, concave, Status.SOLVER_ERROR, _CONCAVE)
        return outcome.y.reshape(*self.batch, sum(self.layout.sections)), outcome

    def _guess(self, given: Sequence[Tensor], like: Tensor) -> Tensor:
        """The initial x, ``(B, n)``."""
        count = self.batch.numel()
        if not given:
            return like.new_zeros(count, self.layout.size)
        return given[0].expand(*self.batch, -1).reshape(count, self.layout.size)

    def _run_batched(self, program: QuadraticProgram, guess: Tensor) -> Outcome:
        problem = BatchQuadraticProblem(
            self.batch.numel(), **{name: self._rows(program, name) for name in ARGUMENTS}
        )
        outcome = run_batched(self.solver, problem, self._unknowns(guess), self.options)
        bad = _unusable_samples(program, self.batch)
        return _without(outcome, bad, Status.NOT_CONVERGED, "an argument holds NaN or infinity")

    def _unknowns(self, guess: Tensor) -> Tensor:
        """z to start from: the guess of x, and no multipliers; ``(B, N)``."""
        unknowns = guess.new_zeros(guess.shape[0], sum(self.layout.sections))
        unknowns[:, : self.layout.size] = guess
        return unknowns

    def _rows(self, program: QuadraticProgram, name: str) -> Any:
        """One argument as ``(1 or B, ...)``, dense."""
        if name not in program.tensors:
            return None
        tensor, form = program.tensors[name], self.layout.forms.get(name)
        tensor = tensor if form is None else form.dense(tensor)
        tensor = 0.5 * (tensor + tensor.mT) if name == "P" else tensor
        event = tensor.shape[tensor.ndim - (1 if form is None else 2) :]
        if tensor.numel() == event.numel():
            return tensor.reshape(1, *event)
        return tensor.expand(*self.batch, *event).reshape(-1, *event)

    def _run_samples(self, program: QuadraticProgram, guess: Tensor) -> Outcome:
        work = QuadraticWorkload(
            self.name,
            self.solver,
            self.options,
            self.layout.size,
            _border(self.layout, program, self.batch),
            self._unknowns(guess),
            self.limits,
            range(guess.shape[0]),
        )
        with progress_bar(len(work.todo), show=self.limits.progress) as done:
            if self.asked == "threads":
                return run_in_threads(work, done)  # type: ignore[arg-type]
            record = SampleRecord(work.y0, done)
            if self.limits.executor is not None:
                return self._on_pool(self.limits.executor, work, record, "executor")
            if self.asked == "processes":
                with own_processes() as pool:
                    return self._on_pool(pool, work, record, "processes")
            for index in work.todo:
                record.add(index, work.report(index))
        return replace(record.outcome("serial"), why="quadratic programs are solved one by one")

    def _on_pool(
        self, executor: Executor, work: QuadraticWorkload, record: SampleRecord, how: str
    ) -> Outcome:
        usable = []
        for index in work.todo:
            if wrong := _unusable(work.problem(index)):
                record.add(index, _not_called(wrong))
            else:
                usable.append(index)
        job = lambda index: (work.problem(index), work.guess(index))  # noqa: E731
        run_on_pool(executor, self.solver, usable, job, self.options, record)
        return record.outcome(how)

    def mapped(self, size: int, dims: Sequence[int | None]) -> QuadraticForward:
        return replace(self, batch=Size((size, *self.batch)))

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        names = [*self.layout.names, "x0"]
        return tuple(
            self._moved(tensor, dim, size, self.layout.event_dims(name))
            for name, tensor, dim in zip(names, tensors, dims, strict=False)
        )

    def _moved(self, tensor: Tensor, dim: int | None, size: int, event_dims: int) -> Tensor:
        """The mapped dimension in front of all batch dims."""
        if dim is None:
            return tensor
        tensor = _functorch.mapped_first(tensor, dim, size)
        missing = len(self.batch) - (tensor.ndim - 1 - event_dims)
        return tensor.reshape(size, *(1 for _ in range(missing)), *tensor.shape[1:])


def _without(outcome: Outcome, bad: Tensor, status: Status, why: str) -> Outcome:
    """The outcome, with no solution for some samples, whatever the solver says."""
    if not bool(bad.any()):
        return outcome
    message = (why if is_bad else text for is_bad, text in zip(bad.tolist(), outcome.message, strict=True))
    return replace(
        outcome,
        y=torch.where(bad.unsqueeze(-1), torch.nan, outcome.y),
        status=torch.where(bad, int(status), outcome.status),
        message=tuple(message),
    )


_CONCAVE: Final = (
    "P is not positive semidefinite: the program is not convex, and what satisfies the conditions need be no "
    "minimum"
)


def _not_convex(program: QuadraticProgram, batch: Size) -> Tensor | None:
    """Which samples have a P with a negative eigenvalue, ``(B,)``; None if none is seen to have one."""
    if "P" not in program.tensors or not batch.numel():
        return None
    held, form = program.tensors["P"], program.layout.forms["P"]
    negative = (
        _has_negative_direction(program, form) if isinstance(form, SparseForm) else _is_indefinite(held)
    )
    if not bool(negative.any()):
        return None
    return negative.expand(batch).reshape(-1)


def _is_indefinite(P: Tensor) -> Tensor:
    """By a Cholesky factorisation, up to rounding; ``(*batch,)``."""
    P = 0.5 * (P + P.mT)
    size = P.abs().amax((-1, -2)) if P.shape[-1] else P.new_zeros(P.shape[:-2])
    ridge = torch.where(size > 0, _SEMIDEFINITE * size, torch.ones_like(size))
    shifted = P + torch.diag_embed(ridge.unsqueeze(-1).expand(*P.shape[:-1]))
    return (torch.linalg.cholesky_ex(shifted).info > 0) & P.isfinite().all(-1).all(-1)


def _has_negative_direction(program: QuadraticProgram, form: SparseForm) -> Tensor:
    """By the diagonal, and a few steps of the power method: what it finds is proof, what it misses is not."""
    held = program.tensors["P"]
    on_diagonal = form.row == form.column
    size = held.abs().amax(-1, keepdim=True) if held.shape[-1] else held.new_zeros(*held.shape[:-1], 1)
    found = ((held < -_SEMIDEFINITE * size) & on_diagonal).any(-1)
    if bool(on_diagonal.all()):
        return found
    x = torch.randn(*held.shape[:-1], form.rows, generator=torch.Generator().manual_seed(0), dtype=held.dtype)
    x = x.to(held.device)
    top = form.multiply(held.abs(), torch.ones_like(x)).amax(-1, keepdim=True)
    for _ in range(_POWER_STEPS):
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = top * x - program.curvature(x)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return found | ((x * program.curvature(x)).sum(-1) < -_SEMIDEFINITE * top.squeeze(-1))


_SEMIDEFINITE: Final = 1e-9  # eigenvalues of P above minus this share of its largest entry pass for zero
_POWER_STEPS: Final = 20

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
        wrong = _unusable(problem)
        if wrong:
            return _not_called(wrong)
        check()
        return report_of(lambda: self._solve(problem, index), int(self.y0.shape[-1]))

    def _solve(self, problem: QuadraticProblem, index: int) -> SolverResult:
        return self.solver.solve(problem, self.guess(index), dict(self.options))

    def guess(self, index: int) -> np.ndarray:
        """The initial x of one program; zeros if there is none."""
        guess: np.ndarray = self.y0[index, : self.size].to("cpu", torch.float64, copy=True).numpy()
        return guess


def _not_called(wrong: str) -> SampleReport:
    return SampleReport(Status.NOT_CONVERGED, f"{wrong}; the solver was not called")


def _unusable(problem: QuadraticProblem) -> str:
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


def _unusable_samples(program: QuadraticProgram, batch: Size) -> Tensor:
    """The same for a batch in torch: which samples, ``(B,)``."""
    bad = torch.zeros(batch, dtype=torch.bool, device=program.tensors["q"].device)
    for name, tensor in program.tensors.items():
        wrong = tensor.isnan() | (tensor == _ONE_SIDED[name]) if name in _ONE_SIDED else ~tensor.isfinite()
        bad = bad | wrong.flatten(tensor.ndim - program.layout.event_dims(name)).any(-1)
    return bad.reshape(-1)


_ONE_SIDED: Final = {"h": -math.inf, "ub": -math.inf, "lb": math.inf}


def _border(layout: QuadraticLayout, program: QuadraticProgram, batch: Size) -> dict[str, Rows]:
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
