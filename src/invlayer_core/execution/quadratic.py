"""The forward solve of quadratic programs by a registered solver: matrices cross the border, no F does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Size, Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.quadratic import ARGUMENTS, QuadraticLayout, QuadraticProgram
from invlayer_core.execution.batched import run_batched
from invlayer_core.execution.convexity import CONCAVE, not_convex
from invlayer_core.execution.forward import Forward
from invlayer_core.execution.limits import Limits, progress_bar
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.plan import BatchMode
from invlayer_core.execution.program_pool import own_processes, run_on_pool
from invlayer_core.execution.quadratic_programs import (
    QuadraticWorkload,
    arguments_on_host,
    not_called,
    unusable,
    unusable_samples,
)
from invlayer_core.execution.samples import SampleRecord
from invlayer_core.execution.threads import run_in_threads
from invlayer_core.solvers.contract import Solver, Status
from invlayer_core.solvers.quadratic import BatchQuadraticProblem

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
        concave = not_convex(program, self.batch)
        guess = self._guess(tensors[split:], program.tensors["q"])
        if self.solver.batched:
            outcome = self._run_batched(program, guess)
        else:
            outcome = self._run_samples(program, guess)
        if concave is not None:
            outcome = _without(outcome, concave, Status.SOLVER_ERROR, CONCAVE)
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
        bad = unusable_samples(program, self.batch)
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
            arguments_on_host(self.layout, program, self.batch),
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
            if wrong := unusable(work.problem(index)):
                record.add(index, not_called(wrong))
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
