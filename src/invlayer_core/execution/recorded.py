"""A batched solver's iterations on the graph: plain torch, which every transform goes through by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.batched import run_batched
from invlayer_core.execution.outcome import Outcome
from invlayer_core.solvers.contract import BatchProblem
from invlayer_core.solvers.iterations import DifferentiableSolver, Iterations
from invlayer_core.solvers.listing import SolverListing
from invlayer_core.solvers.lookup import get_solver, get_spec
from invlayer_core.solvers.registry import get_registry

if TYPE_CHECKING:
    from invlayer_core.execution.registered import RegisteredForward

__all__ = ["RecordedIterations", "not_recordable"]


@final
@dataclass(frozen=True)
class RecordedIterations(Iterations):
    """The iterations of a registered forward; tensors are ``(y0, *theta, *tensors of the options)``."""

    forward: RegisteredForward
    solver: DifferentiableSolver
    tensors: tuple[Tensor, ...]
    recorded: Tensor | None = None

    @property
    def start(self) -> Tensor:
        return self.tensors[0].reshape(self.forward.system.shape.full)

    def with_recorded(self, recorded: Tensor | None) -> RecordedIterations:
        return replace(self, recorded=recorded)

    def run(self) -> tuple[Tensor, Outcome]:
        """The forward solve itself, on the graph."""
        workload = replace(self.forward.workload(self.tensors), recorded=True)
        outcome = run_batched(
            self.solver, workload.problem(), workload.y0, workload.shared_options, recorded=True
        )
        shape = self.forward.system.shape.full
        recorded = None if outcome.recorded is None else outcome.recorded.reshape(shape)
        return outcome.y.reshape(shape), replace(_unwrapped(outcome), recorded=recorded)

    def whole(self, system: System, start: Tensor, theta: Sequence[Tensor]) -> Tensor:
        problem, y0, options = self._on(system, start, theta)
        result: Tensor = self.solver.solve(problem, y0, options).y  # type: ignore[assignment]
        return result.reshape(start.shape)

    def last(self, system: System, y: Tensor, theta: Sequence[Tensor], steps: int) -> Tensor:
        problem, y0, options = self._on(system, y, theta)
        return self.solver.iterate(problem, y0, options, steps).reshape(y.shape)

    def _on(
        self, system: System, start: Tensor, theta: Sequence[Tensor]
    ) -> tuple[BatchProblem, Tensor, dict[str, Any]]:
        options = self.tensors[1 + len(self.forward.system.theta) :]
        forward = replace(self.forward, system=replace(system, parts=self.forward.system.parts))
        workload = replace(forward.workload((start, *theta, *options)), recorded=True)
        return workload.problem(), workload.y0, workload.shared_options


def _unwrapped(outcome: Outcome) -> Outcome:
    """Iterations and messages for every sample, also those of mapped dimensions."""
    status, iterations = torch.broadcast_tensors(outcome.status, outcome.iterations)
    iterations = _functorch.plain(torch.where(status >= 0, iterations, iterations))
    copies = iterations.numel() // max(1, len(outcome.message))
    return replace(outcome, iterations=iterations.reshape(-1), message=outcome.message * copies)


def not_recordable(called: str, name: str) -> ConditionsError:
    """The error for an adjoint that needs the iterations of a solver that autograd cannot record."""
    able = sorted({row.name for row in get_registry().solvers() if _is_differentiable(row)})
    return ConditionsError(
        f"adjoint={called} came with solver {name!r}: it differentiates through the solver's "
        "iterations, and autograd cannot record those of this one. Accepted are solvers written in "
        f"differentiable torch (a DifferentiableSolver): {', '.join(able)}. For any other take "
        "adjoint=Implicit()."
    )


def _is_differentiable(row: SolverListing) -> bool:
    if row.status != "ok" or not get_spec(row.name).batched:
        return False
    return isinstance(get_solver(row.name), DifferentiableSolver)
