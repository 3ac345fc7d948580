"""A batch of systems with the per-sample solver that is to solve it, apart from the way in which it runs.

The conditions are whole-tensor functions, and only they know which of their args are batched. So one
sample's residual is its row of the whole batch's, unless ``rowwise`` says which tensors have one row per
sample (``narrowing.py`` finds that out): then a sample, or a chunk of them, is a smaller batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Size, Tensor

from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.limits import NO_LIMITS, Deadline, Limits
from invlayer_core.execution.samples import SampleReport, report_of, resting_rows, to_numpy
from invlayer_core.solvers.contract import BatchProblem, SampleProblem, Solver, SolverResult
from invlayer_core.structure import Arguments, SystemShape

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Derivatives", "Wanted", "Workload"]

Wanted = str
"""What a solver asks for: a method of :class:`Problem` that takes y."""


@final
@dataclass(frozen=True)
class Derivatives:
    """How J, and F″ of scalar equations, are taken: functions of ``(system, y, theta)``.

    ``linearized`` gives F and J, from one evaluation, on the graph or not.
    """

    jacobian: Callable[[System, Tensor, Sequence[Tensor]], Tensor]
    second: Callable[[System, Tensor, Sequence[Tensor]], Tensor]
    linearized: Callable[[System, Tensor, Sequence[Tensor], bool], tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True)
class Workload:
    """B systems, where to start, and the solver with its options.

    Attributes
    ----------
    name, kind : str
        Of the solver, and of the problem.
    solver : Solver
    system : System
        In the batch shape of the user; F is called on the whole of it.
    derivatives : Derivatives
    y0 : Tensor of shape ``(B, n)``
    theta : tuple of Tensor
    options : Arguments
        The user's options, taken apart into tensors and all else.
    option_tensors : tuple of Tensor
        Each ``(*batch, ...)``, one row per sample, or without dims.
    limits : Limits
    rowwise : tuple of bool, or None
        Which of ``theta`` have one row per sample; None if the batch cannot be divided.
    todo : range
        The rows to solve.
    first : int
        The number of row 0 in the user's batch.
    recorded : bool
        Whether what the problem gives hangs on the graph.
    """

    name: str
    kind: str
    solver: Solver
    system: System
    derivatives: Derivatives
    y0: Tensor
    theta: tuple[Tensor, ...]
    options: Arguments
    option_tensors: tuple[Tensor, ...] = ()
    limits: Limits = NO_LIMITS
    rowwise: tuple[bool, ...] | None = None
    todo: range = field(default=range(0))
    first: int = 0
    recorded: bool = False

    @property
    def shared_options(self) -> dict[str, Any]:
        """The options of a batched solver, tensors for all samples among them."""
        (options,) = self.options.unflatten(self.option_tensors)
        return dict(options)

    def problem(self) -> BatchProblem:
        """All systems at once."""
        return BatchProblem(
            self.kind, self.system.shape.size, self.y0.shape[0], self._residual, self._jacobian, self._second,
            {name: partial(self._part, name) for name in self.part_names}, _Linearized(self),
        )  # fmt: skip

    @property
    def part_names(self) -> tuple[str, ...]:
        """What can be asked for beside F: the parts of the system, and their Jacobians."""
        names = tuple(self.system.parts)
        derived = tuple(f"{name}_jacobian" for name in names if not name.endswith("_jacobian"))
        return names + tuple(name for name in derived if name not in names)

    def _part(self, name: str, y: Tensor) -> Tensor:
        """A part, ``(B, ...)``, or its Jacobian, ``(B, m, n)``."""
        point, count = y.reshape(self.system.shape.full), y.shape[0]
        if name not in self.system.parts:
            system = self.system.of_part(name.removesuffix("_jacobian"))
            return self.derivatives.jacobian(system, point, self.theta)
        system = self.system.of_part(name)
        with self.recording():
            value = system.residual(point, self.theta)
        system.check_residual(value)
        return value.reshape(count, *value.shape[len(system.shape.batch) :]).to(y.dtype)

    def everything(self, y: Tensor) -> Tensor:
        """F and all parts at ``y`` ``(B, n)``, as one row per sample: what a solver may come to see."""
        names = [name for name in self.system.parts if not name.endswith("_jacobian")]
        parts = [self._part(name, y).reshape(y.shape[0], -1) for name in names]
        return torch.cat([self._residual(y), *parts], -1)

    def _residual(self, y: Tensor) -> Tensor:
        shape = self.system.shape
        with self.recording():
            residual = self.system.residual(y.reshape(shape.full), self.theta)
        return self.checked(residual, y)

    def recording(self) -> torch.set_grad_enabled:
        """The grad mode in which the conditions are evaluated."""
        return torch.set_grad_enabled(self.recorded and torch.is_grad_enabled())

    def checked(self, residual: Tensor, y: Tensor) -> Tensor:
        """F as ``(B, n)``, in the dtype of y; refused if it has not as many equations as unknowns."""
        shape = self.system.shape
        self.system.check_residual(residual)
        if residual.numel() != y.numel():
            raise ConditionsError(
                f"{self.name} needs as many equations as unknowns; the conditions returned shape "
                f"{tuple(residual.shape)} for y0 of shape {tuple(shape.full)}. If args are batched, give y0 "
                "the same batch dims, for example y0.expand(B, n)."
            )
        return residual.reshape(y.shape).to(y.dtype)

    def _jacobian(self, y: Tensor) -> Tensor:
        return self.derivatives.jacobian(self.system, y.reshape(self.system.shape.full), self.theta)

    def _second(self, y: Tensor) -> Tensor:
        second = self.derivatives.second(self.system, y.reshape(self.system.shape.full), self.theta)
        return second.reshape(y.shape)

    def rows(self, start: int, stop: int) -> Workload:
        """The samples from ``start`` to before ``stop`` alone; as a smaller batch where that is possible."""
        if self.rowwise is None:
            return replace(self, todo=range(start, stop))
        lead = Size((*(1 for _ in self.system.shape.batch[1:]), stop - start))
        theta = tuple(
            self._cut(tensor, lead, start) if rowwise else tensor
            for tensor, rowwise in zip(self.theta, self.rowwise, strict=True)
        )
        given = theta[: len(self.system.arguments.tensors)]
        return replace(
            self,
            system=replace(
                self.system,
                arguments=replace(self.system.arguments, tensors=given),
                shape=SystemShape(lead, self.system.shape.event),
            ),
            y0=self.y0[start:stop],
            theta=theta,
            option_tensors=tuple(self._cut(t, lead, start) if t.ndim else t for t in self.option_tensors),
            todo=range(stop - start),
            first=self.first + start,
        )

    def _cut(self, tensor: Tensor, lead: Size, start: int) -> Tensor:
        rest = tensor.shape[len(lead) :]
        rows = tensor.reshape(self.y0.shape[0], *rest)[start : start + lead[-1]]
        return rows.reshape(*lead, *rest)

    def options_of(self, index: int) -> dict[str, Any]:
        """A fresh dict of options for one sample: its row of every tensor, as float64 NumPy or a float."""
        rows: list[Any] = [self._option_row(tensor, index) for tensor in self.option_tensors]
        (options,) = self.options.unflatten(rows)
        return dict(options)

    def _option_row(self, tensor: Tensor, index: int) -> Any:
        if tensor.ndim:
            rest = tensor.shape[len(self.system.shape.batch) :]
            tensor = tensor.reshape(self.y0.shape[0], *rest)[index]
        return to_numpy(tensor) if tensor.ndim else tensor.item()

    def sample(self, index: int, ask: Callable[[Wanted, np.ndarray], np.ndarray]) -> SampleProblem:
        """System ``index``, evaluated by ``ask``."""
        return SampleProblem(
            self.kind,
            self.system.shape.size,
            self.first + index,
            lambda y: ask("residual", y),
            lambda y: ask("jacobian", y),
            lambda y: ask("second_derivative", y),
            {name: partial(ask, name) for name in self.part_names},
        )

    def alone(self, index: int) -> Callable[[Wanted, np.ndarray], np.ndarray]:
        """How system ``index`` is evaluated by itself, or if need be with every other row at rest."""
        part = self.rows(index, index + 1)
        problem, like = part.problem(), part.y0
        if like.shape[0] == 1:
            return _Row(part, problem)
        resting = resting_rows(like)

        def evaluate(wanted: Wanted, y: np.ndarray) -> np.ndarray:
            row = torch.as_tensor(y, dtype=torch.float64).to(like)
            rows = resting.clone()
            rows[index] = row.reshape(-1)
            return to_numpy(getattr(problem, wanted)(rows)[index])

        return evaluate

    def solve(
        self, index: int, ask: Callable[[Wanted, np.ndarray], np.ndarray]
    ) -> Callable[[], SolverResult]:
        """The solve of one sample, ready to run; the solver gets private copies of guess and options."""
        return lambda: self.solver.solve(
            self.sample(index, ask), to_numpy(self.y0[index]), self.options_of(index)
        )

    def report(self, index: int, check: Callable[[], Any] = lambda: None) -> SampleReport:
        """Solve one sample by itself; ``check`` may end it whenever it asks for F."""
        evaluate, deadline = self.alone(index), Deadline(self.limits.timeout)

        def ask(wanted: Wanted, y: np.ndarray) -> np.ndarray:
            check()
            deadline.check()
            return evaluate(wanted, y)

        return report_of(self.solve(index, ask), self.system.shape.size)


@final
class _Linearized:
    """F or a part, by name, with its Jacobian: from one evaluation, with as little around it as can be."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.shape = workload, workload.system.shape
        self.systems = {"residual": workload.system}

    def __call__(self, name: str, y: Tensor) -> tuple[Tensor, Tensor]:
        workload, point = self.workload, y.reshape(self.shape.full)
        system, given = self._system(name), f"{name}_jacobian"
        if given in workload.system.parts:  # the user's own
            with workload.recording():
                value = system.residual(point, workload.theta)
                blocks = self._system(given).residual(point, workload.theta)
        else:
            value, blocks = workload.derivatives.linearized(system, point, workload.theta, workload.recorded)
        if name == "residual":
            return workload.checked(value, y), blocks
        system.check_residual(value)
        value, blocks = value.reshape(y.shape[0], -1), blocks.reshape(y.shape[0], -1, y.shape[1])
        return (value if value.dtype == y.dtype else value.to(y.dtype)), blocks

    def _system(self, name: str) -> System:
        if name not in self.systems:
            self.systems[name] = self.workload.system.of_part(name)
        return self.systems[name]


@final
class _Row:
    """The evaluation of a batch of one, with as little around a cheap F as can be."""

    def __init__(self, part: Workload, problem: BatchProblem) -> None:
        self.problem, self.like, self.shape = problem, part.y0, part.system.shape
        self.function = part.system.function
        self.args = None if part.system.captured else part.system.arguments.unflatten(part.theta)

    def __call__(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        row = torch.as_tensor(y, dtype=torch.float64)
        if row.dtype != self.like.dtype or row.device != self.like.device:
            row = row.to(self.like)
        value: Any = None
        if wanted == "residual" and self.args is not None:
            with torch.no_grad():
                value = self.function(row.reshape(self.shape.full), *self.args)
        if not self._is_sound(value):  # a derivative; or let the careful way tell what is wrong
            value = getattr(self.problem, wanted)(row.reshape(1, -1))[0]
            return to_numpy(value)
        return to_numpy(value.reshape(-1))

    def _is_sound(self, value: Any) -> bool:
        batch = self.shape.batch
        return (
            isinstance(value, Tensor)
            and value.dtype == self.like.dtype
            and value.numel() == self.shape.size
            and value.shape[: len(batch)] == batch
        )
