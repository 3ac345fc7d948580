"""A constrained problem with its tensors: conditions for z = (y, multipliers), and a forward that finds z."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.call import DERIVATIVES, SolverLike, choose_forward
from invlayer_core.conditions.kkt import Activity, ConstraintLayout, KKTConditions, Program
from invlayer_core.conditions.stationarity import StationarityConditions
from invlayer_core.conditions.system import System
from invlayer_core.execution.forward import Forward
from invlayer_core.execution.multistart import Acceptance, Multistart
from invlayer_core.execution.program import ProgramForward
from invlayer_core.implicit import Settings, Solution, find_captured, solve_implicitly
from invlayer_core.polish import polish
from invlayer_core.starts import Starts, acceptance
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["PosedProgram"]


@final
class PosedProgram:
    """The functions of a constrained problem, its args with the bounds, and where to start."""

    def __init__(
        self, program: Program, arguments: Arguments, starts: Starts, settings: Settings, activity: Activity
    ) -> None:
        self.program, self.arguments, self.starts, self.settings = program, arguments, starts, settings
        with torch.no_grad():
            detached = arguments.unflatten([tensor.detach() for tensor in arguments.tensors])
            sizes = [int(value.shape[-1]) for value in program.constraints(starts.first, *detached)]
        self.layout = ConstraintLayout(starts.first.shape[-1], *sizes)
        self.conditions = KKTConditions(program, self.layout, activity)

    def solve(self, solver: SolverLike, options: Mapping[str, Any] | None) -> Solution:
        """z, certified, polished and differentiable."""
        start = self.starts.first
        guess = torch.cat([start, start.new_zeros(*start.shape[:-1], self.layout.constraints)], -1)
        system = System(self.conditions, self.arguments, SystemShape.of(guess, 1))
        captured = find_captured(system, guess) if _functorch.is_active() else None
        system = system.with_captured(captured or ())
        inner = replace(
            system,
            function=StationarityConditions(self.program.parts["objective"]),
            shape=SystemShape.of(start, 1),
            parts=self.program.parts,
            reads_all=False,
        )
        forward, tensors = choose_forward("nlp", inner, start, solver, options or {}, self.settings, bounds=2)
        rows = replace(system, function=self.conditions.rows, reads_all=False)
        whole: Forward = ProgramForward(forward, len(tensors), rows, self.layout, DERIVATIVES)
        if self.starts.others.shape[0]:
            whole = Multistart(whole, self._ranked(system), self._acceptance(), first_theta=len(tensors))
            tensors = (torch.cat([tensors[0].unsqueeze(0), self.starts.others]), *tensors[1:])
        return solve_implicitly(
            self.conditions,
            self.arguments,
            whole,
            (*tensors, *system.theta),
            self.settings,
            captured=captured,
            warm=self.starts.warm,
        )

    def _ranked(self, system: System) -> System:
        """The system of z with the objective, by which solutions are compared."""
        objective = _OfUnknowns(self.program.parts["objective"], self.layout)
        return replace(system, parts={"objective": objective})

    def _acceptance(self) -> Acceptance:
        """What the certificate would say of z after its polish, which a solver of low accuracy counts on."""
        accept, steps = acceptance(self.settings.atol, self.settings.rtol), self.settings.polish
        method = getattr(self.settings.adjoint, "linear_solver", None)

        def accept_polished(
            system: System, z: Tensor, theta: Sequence[Tensor], status: Tensor
        ) -> tuple[Tensor, Tensor]:
            if steps:
                with torch.no_grad():
                    residual = system.residual(z, theta)
                z = polish(system, z, residual, steps, method, theta=theta)[0]
            return accept(system, z, theta, status)

        return accept_polished


@final
@dataclass(frozen=True)
class _OfUnknowns:
    """A function of y as one of z."""

    function: Callable[..., Tensor]
    layout: ConstraintLayout

    def __call__(self, z: Tensor, *args: Any) -> Tensor:
        return self.function(self.layout.split(z)[0], *args)
