"""The forward solve by a registered solver on the conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.batched import run_batched
from invlayer_core.execution.forward import Forward, run_forward
from invlayer_core.execution.limits import Limits
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.plan import BatchMode, run_workload
from invlayer_core.execution.recorded import RecordedIterations, not_recordable
from invlayer_core.execution.workload import Derivatives, Workload
from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.iterations import DifferentiableSolver, Iterations
from invlayer_core.structure import Arguments

__all__ = ["RegisteredForward", "mapped_system", "open_options"]


@final
@dataclass(frozen=True)
class RegisteredForward(Forward):
    """A registered solver on the conditions; tensors are ``(y0, *theta, *tensors of the options)``.

    Attributes
    ----------
    name, kind : str
    solver : Solver
    asked : BatchMode
        How the user wants a batch to run.
    thread_safe : bool
        Whether several threads may use the solver at once.
    limits : Limits
    options : Arguments
        The user's options, taken apart into tensors and all else.
    system : System
    derivatives : Derivatives
        How the solver's Jacobians are taken.
    """

    name: str
    kind: str
    solver: Solver
    asked: BatchMode
    thread_safe: bool
    limits: Limits
    options: Arguments
    system: System
    derivatives: Derivatives

    @property
    def how(self) -> str:  # type: ignore[override]
        return "batched" if self.solver.batched else self.asked

    @property
    def event_dims(self) -> int:  # type: ignore[override]
        return len(self.system.shape.event)

    def workload(self, tensors: Sequence[Tensor]) -> Workload:
        """The batch with the tensors in place."""
        shape, split = self.system.shape, 1 + len(self.system.theta)
        return Workload(
            name=self.name,
            kind=self.kind,
            solver=self.solver,
            system=self.system,
            derivatives=self.derivatives,
            y0=tensors[0].reshape(shape.count, shape.size),
            theta=tuple(tensors[1:split]),
            options=self.options,
            option_tensors=tuple(tensors[split:]),
            limits=self.limits,
            todo=range(shape.count),
        )

    def iterations(self, tensors: Sequence[Tensor], called: str) -> Iterations:
        if not isinstance(self.solver, DifferentiableSolver):
            raise not_recordable(called, self.name)
        return RecordedIterations(self, self.solver, tuple(tensors))

    def resolver(self, tensors: Sequence[Tensor], called: str) -> Callable[[System, Tensor], Tensor]:
        options = tensors[1 + len(self.system.theta) :]

        def resolve(system: System, start: Tensor) -> Tensor:
            forward = replace(self, system=system)
            return run_forward(forward, (start, *system.theta, *options))[0]

        return resolve

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        shape, workload = self.system.shape, self.workload(tensors)
        if self.solver.batched:
            options = workload.shared_options
            outcome = run_batched(self.solver, workload.problem(), workload.y0, options)
        else:
            self._check_option_tensors(workload.option_tensors)
            outcome = run_workload(workload, self.asked, thread_safe=self.thread_safe)
        return outcome.y.reshape(shape.full), outcome

    def _check_option_tensors(self, tensors: Sequence[Tensor]) -> None:
        batch = self.system.shape.batch
        for tensor in tensors:
            if tensor.ndim and tensor.shape[: len(batch)] != batch:
                raise ConditionsError(
                    f"{self.name}: a tensor in options has shape {tuple(tensor.shape)}; a tensor there means "
                    f"one value per sample, so accepted are {(*batch, '...')} and (). Give a NumPy array, or "
                    "a number, for what all samples share."
                )

    def mapped(self, size: int, dims: Sequence[int | None]) -> RegisteredForward:
        mapped = mapped_system(self.system, size, dims[1 : 1 + len(self.system.theta)])
        return replace(self, system=mapped)

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        split = 1 + len(self.system.theta)
        options = (
            self._moved_option(tensor, dim, size)
            for tensor, dim in zip(tensors[split:], dims[split:], strict=True)
        )
        return _functorch.mapped_first(tensors[0], dims[0], size), *tensors[1:split], *options

    def _moved_option(self, tensor: Tensor, dim: int | None, size: int) -> Tensor:
        """One row per sample of the mapped batch, where it had one per sample before."""
        batch = self.system.shape.batch
        if dim is None and (tensor.ndim == 0 or tensor.shape[: len(batch)] != batch):
            return tensor
        tensor = _functorch.mapped_first(tensor, dim, size)
        if tensor.ndim == 1 and batch:
            tensor = tensor.reshape(size, *(1 for _ in batch)).expand(size, *batch)
        return tensor


@final
@dataclass(frozen=True)
class _Evaluation:
    """F, or the user's J, of a system as a function of tensors alone."""

    system: System
    jacobian: bool = False

    def __call__(self, y: Tensor, *theta: Tensor) -> Tensor:
        evaluate = self.system.analytic_jacobian if self.jacobian else self.system.residual
        return evaluate(y, theta)


@final
@dataclass(frozen=True)
class _Mapped:
    """A function of tensors with one more dimension each (``dims`` as in ``torch.vmap``)."""

    function: Callable[..., Tensor]
    dims: tuple[int | None, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        mapped = torch.vmap(self.function, in_dims=self.dims, randomness="different")
        result: Tensor = mapped(*tensors)
        return result


def mapped_system(system: System, size: int, dims: Sequence[int | None]) -> System:
    """The system of one more batch dimension, for θ that is mapped along ``dims`` (as in ``torch.vmap``)."""
    dims = (0, *dims)
    return System(
        function=_Mapped(_Evaluation(system), dims),
        arguments=Arguments.flatten(tuple(torch.empty(0) for _ in dims[1:])),
        shape=system.shape.mapped(size),
        jacobian=None if system.jacobian is None else _Mapped(_Evaluation(system, jacobian=True), dims),
        parts={name: _Mapped(_Evaluation(system.of_part(name)), dims) for name in system.parts},
        reads_all=system.reads_all,
        chunk_size=system.chunk_size,
    )


def open_options(options: Mapping[str, Any] | None) -> Arguments:
    """The user's options, taken apart into tensors and all else.

    Raises
    ------
    ConditionsError
        If they are no mapping from names to values.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConditionsError(f"options={options!r}: accepted is a mapping, such as {{'maxiter': 50}}.")
    return Arguments.flatten((dict(options or {}),))
