"""A batch of systems with the per-sample solver that is to solve it, apart from the way in which it runs.

The conditions are whole-tensor functions, and only they know which of their args are batched. So one
sample's residual is its row of the whole batch's, unless ``rowwise`` says which tensors have one row per
sample (``narrowing.py`` finds that out): then a sample, or a chunk of them, is a smaller batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Size, Tensor

from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.evaluation import (
    AmongOthers,
    Ask,
    AtStart,
    Function,
    Remembering,
    Row,
    RowForm,
    ScalarFunction,
    evaluate_starts,
)
from invlayer_core.execution.limits import NO_LIMITS, Deadline, Limits
from invlayer_core.execution.linearized import Linearized
from invlayer_core.execution.options import OptionRows
from invlayer_core.execution.samples import SampleReport, report_of, to_numpy
from invlayer_core.solvers.contract import BatchProblem, SampleProblem, Solver, SolverResult
from invlayer_core.solvers.problem import Products
from invlayer_core.structure import Arguments, SystemShape

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Derivatives", "Workload"]


@final
@dataclass(frozen=True)
class Derivatives:
    """How J, and F″ of scalar equations, are taken: functions of ``(system, y, theta)``.

    ``linearized`` gives F and J, from one evaluation, on the graph or not; ``products`` F and the products
    J v and Jᵀu, without gradient.
    """

    jacobian: Callable[[System, Tensor, Sequence[Tensor]], Tensor]
    second: Callable[[System, Tensor, Sequence[Tensor]], Tensor]
    linearized: Callable[[System, Tensor, Sequence[Tensor], bool], tuple[Tensor, Tensor]]
    products: Callable[[System, Tensor, Sequence[Tensor]], Products]


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
    at_start : AtStart or None
        What is known of every sample at its start.
    together : bool
        Whether a worker of an executor solves the samples of a chunk in lockstep.
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
    at_start: AtStart | None = None
    together: bool = False
    recorded: bool = False

    @property
    def shared_options(self) -> dict[str, Any]:
        """The options of a batched solver, tensors for all samples among them."""
        (options,) = self.options.unflatten(self.option_tensors)
        return dict(options)

    def problem(self) -> BatchProblem:
        """All systems at once."""
        linearized = Linearized(self)
        return BatchProblem(
            self.kind, self.system.shape.size, self.y0.shape[0], self._residual, self._jacobian, self._second,
            {name: partial(self._part, name) for name in self.part_names}, linearized, linearized.products,
        )  # fmt: skip

    @cached_property
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
            at_start=None,
        )

    def _cut(self, tensor: Tensor, lead: Size, start: int) -> Tensor:
        if len(lead) == 1:
            return tensor[start : start + lead[0]]
        rest = tensor.shape[len(lead) :]
        rows = tensor.reshape(self.y0.shape[0], *rest)[start : start + lead[-1]]
        return rows.reshape(*lead, *rest)

    @cached_property
    def _guesses(self) -> np.ndarray:
        return to_numpy(self.y0)

    @cached_property
    def _option_rows(self) -> OptionRows:
        dims = len(self.system.shape.batch)
        return OptionRows(self.options, self.option_tensors, dims, self.y0.shape[0])

    def options_of(self, index: int) -> dict[str, Any]:
        """A fresh dict of options for one sample: its row of every tensor, as float64 NumPy or a float."""
        return self._option_rows.of(index)

    def sample(self, index: int, ask: Ask, scalar: ScalarFunction | None = None) -> SampleProblem:
        """System ``index``, evaluated by ``ask``, or where it is asked for numbers by ``scalar``."""
        size, precision = self._constants
        return SampleProblem(
            self.kind,
            size,
            self.first + index,
            ask("residual"),
            ask("jacobian"),
            ask("second_derivative"),
            {name: ask(name) for name in self.part_names},
            precision,
            scalar,
        )

    @cached_property
    def _constants(self) -> tuple[int, float]:
        """n, and the rounding unit of F."""
        return self.system.shape.size, torch.finfo(self.y0.dtype).eps

    @cached_property
    def row_form(self) -> RowForm:
        """What all systems have in common when each is evaluated by itself."""
        shape = self.system.shape
        batch = shape.batch if self.y0.shape[0] == 1 else Size(1 for _ in shape.batch)
        functions = {} if self.system.needs_care else {"residual": self.system.function, **self.system.parts}
        return RowForm(functions, batch, batch + shape.event, self.y0[:0])

    def args_of(self, index: int) -> tuple[Any, ...]:
        """The args of system ``index`` as a batch of one."""
        theta = self.theta
        if self.rowwise is not None:
            pairs, lead = zip(theta, self.rowwise, strict=True), self.row_form.batch
            if len(lead) == 1:
                theta = tuple([t[index : index + 1] if rowwise else t for t, rowwise in pairs])
            else:
                theta = tuple([self._cut(t, lead, index) if rowwise else t for t, rowwise in pairs])
        return self.system.arguments.unflatten(theta)

    def alone(self, index: int) -> Row | AmongOthers:
        """How system ``index`` is evaluated by itself, or if need be with every other row at rest."""
        if self.y0.shape[0] == 1 or self.rowwise is not None:
            return Row(self, index)
        return AmongOthers(self, index)

    def remembering(self, index: int, ask: Ask) -> Ask:
        """``ask`` for system ``index``, but not for what is known already."""
        return ask if self.at_start is None else Remembering(ask, *self.at_start.of(index))

    def with_starts(self) -> Workload:
        """The same, with F and J of every sample at its start."""
        if not len(self.todo) or self.system.parts:  # optimisation asks for more than F
            return self
        jacobian = self.solver.takes_jacobian(self.options_of(0))
        return replace(self, at_start=evaluate_starts(self.problem(), self.y0, jacobian=jacobian))

    def solve(self, index: int, ask: Ask, scalar: ScalarFunction | None = None) -> Callable[[], SolverResult]:
        """The solve of one sample, ready to run; the solver gets private copies of guess and options."""

        def run() -> SolverResult:
            problem = self.sample(index, ask, scalar)
            try:
                return self.solver.solve(problem, self._guesses[index].copy(), self.options_of(index))
            finally:
                problem.release()

        return run

    def report(self, index: int, check: Callable[[], Any] | None = None) -> SampleReport:
        """Solve one sample by itself; ``check`` may end it whenever it asks for F."""
        alone, size = self.alone(index), self._constants[0]
        if check is not None or self.limits.timeout is not None:
            ask = _checking(alone, check, Deadline(self.limits.timeout))
            solve = self.solve(index, self.remembering(index, ask))
        elif size == 1 and isinstance(alone, Row):
            solve = self.solve(index, alone, alone.scalar())
        else:
            solve = self.solve(index, self.remembering(index, alone))
        if not torch.is_grad_enabled():
            return report_of(solve, size)
        with torch.no_grad():  # each thread has a grad mode of its own
            return report_of(solve, size)


def _checking(ask: Ask, check: Callable[[], Any] | None, deadline: Deadline) -> Ask:
    def function(wanted: str) -> Function:
        asked = ask(wanted)

        def checked(y: np.ndarray) -> np.ndarray:
            if check is not None:
                check()
            deadline.check()
            return asked(y)

        return checked

    return function
