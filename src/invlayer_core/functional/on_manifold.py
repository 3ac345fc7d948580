"""Minima among points of a manifold: solved in charts, differentiated in the chart at the solution.

A solver knows vectors. It is given the coordinates of a chart, first around y0; if it went far, once more
around the point where it came to rest. The derivative is taken in the chart at the solution y*: with
y* constant, z(θ) solves ∇_z f(point(y*, z), θ) = 0, and y(θ) = point(y*, z(θ)) is the minimum for every θ
around. That is an implicit function and a smooth one after it, so derivatives are exact to every order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core._autocast import autocast_is_on, without_autocast
from invlayer_core.call import (
    CommonKeywords,
    SolverLike,
    choose_forward,
    name_of,
    open_arguments,
    read_settings,
)
from invlayer_core.certificate import SolveInfo
from invlayer_core.conditions.stationarity import StationarityConditions
from invlayer_core.conditions.structured import StructuredSolver
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import Forward, run_forward
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.settled import SettledForward, continued
from invlayer_core.implicit import Settings, find_captured, solve_implicitly
from invlayer_core.inputs import check_devices, outside_inference_mode, working_precision
from invlayer_core.manifolds.atlas import Atlas
from invlayer_core.solvers.contract import Solver
from invlayer_core.starts import Starts, open_guess, previous_solution
from invlayer_core.structure import SystemShape

__all__ = ["solve_on_manifold", "with_objective"]

_FAR = 1.0  # a move in a chart after which the solver goes on in a new one
_CHARTS = 10


def solve_on_manifold(
    kind: str,
    objective_in: Callable[[Atlas], Callable[..., Tensor]],
    y0: Any,
    args: Any,
    manifold: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    keywords: CommonKeywords,
) -> Any:
    """Both kinds of minimisation; ``objective_in`` makes the objective ``(z, base, *args)`` of the charts."""
    if autocast_is_on():
        with without_autocast():
            return solve_on_manifold(kind, objective_in, y0, args, manifold, solver, options, keywords)
    args = args if isinstance(args, tuple) else (args,)
    y0 = open_guess(y0, args)
    settings = read_settings(keywords)
    atlas = Atlas.of(kind, y0, manifold, settings.event_dims)
    packed = replace(settings, event_dims=1)
    starts = _starts(kind, atlas, y0, packed)
    problem = _Problem(kind, atlas, StationarityConditions(objective_in(atlas)), args, packed)
    point, info = problem.solve(starts, solver, options or {})
    y = atlas.structure.restore(point)
    return (y, info) if settings.return_info else y


def with_objective(info: SolveInfo, objective: Callable[..., Tensor], y: Tensor, args: Any) -> SolveInfo:
    """``info`` with what was minimised, at the solution."""
    arguments, _ = open_arguments(args if isinstance(args, tuple) else (args,))
    with torch.no_grad():
        value = objective(working_precision(y.detach()), *arguments.unflatten(arguments.tensors))
    return replace(info, objective=_functorch.plain(value))


def _starts(kind: str, atlas: Atlas, y0: Any, settings: Settings) -> Starts:
    """The guesses, and an earlier solution, as packed points."""
    if settings.warm_start is not None:
        previous, info = previous_solution(kind, settings.warm_start)
        packed = atlas.structure.pack(f"{kind}(warm_start=...)", previous)
        settings = replace(settings, warm_start=(packed, info))
    y0_of = f"{kind}: y0"
    starts = Starts.of(kind, atlas.structure.pack(kind, y0).detach(), settings)
    return replace(
        starts, first=atlas.checked(y0_of, starts.first), others=atlas.checked(y0_of, starts.others)
    )


@final
@dataclass(frozen=True)
class _Chart:
    """The problem in the coordinates of one chart: around ``base``, with what a solver is given."""

    system: System
    captured: tuple[Tensor, ...] | None
    forward: Forward
    tensors: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class _Rest:
    """Where a solver came to rest: points, which of them are finite, and what it says of them."""

    base: Tensor
    finite: Tensor
    outcome: Outcome


@final
@dataclass(frozen=True)
class _Problem:
    """A problem of points, before a chart is chosen."""

    kind: str
    atlas: Atlas
    conditions: StationarityConditions
    args: tuple[Any, ...]
    settings: Settings

    def solve(
        self, starts: Starts, solver: SolverLike, options: Mapping[str, Any]
    ) -> tuple[Tensor, SolveInfo | None]:
        """y, packed, and what is known about it."""
        if not isinstance(solver, (str, Solver)):
            self._check_one_start(starts, solver)
            base, chart = self._by_function(starts.first, solver, options)
        elif self.settings.adjoint.records_solve:  # the whole solve is differentiated: in the one chart
            base, chart = starts.first, self._chart(starts.first, solver, options)
            forward, tensors = self._with_starts(chart, starts)
            chart = replace(chart, forward=forward, tensors=tensors)
        else:
            base, chart = self._in_charts(starts, solver, options)
        solution = solve_implicitly(
            self.conditions, chart.system.arguments, chart.forward, chart.tensors, self.settings,
            captured=chart.captured, warm=starts.warm,
        )  # fmt: skip
        info = solution.info
        if self.settings.return_info and info is not None:
            objective = self.conditions.parts["objective"]
            info = with_objective(info, objective, solution.y, (base, *self.args))
        return self.atlas.point(base, solution.y), info

    def _check_one_start(self, starts: Starts, solver: Callable[..., Any]) -> None:
        if starts.others.shape[0]:
            raise ConditionsError(
                f"{self.kind}(n_starts={self.settings.n_starts}, manifold=...) came with solver "
                f"{name_of(solver)!r}, a function of your own. Accepted are registered solvers, which are "
                "given the starts one after the other; or let that function try several starts."
            )

    def _system(self, base: Tensor) -> tuple[System, tuple[Tensor, ...] | None]:
        arguments, _ = open_arguments((base, *self.args))
        check_devices(self.kind, base, arguments.tensors)
        z, parts = self.atlas.start(base), self.conditions.parts
        system = System(self.conditions, arguments, SystemShape.of(z, 1), parts=parts)
        captured = find_captured(system, z) if _functorch.is_active() else None
        return system.with_captured(captured or ()), captured

    def _chart(self, base: Tensor, solver: SolverLike, options: Mapping[str, Any]) -> _Chart:
        system, captured = self._system(base)
        start = self.atlas.start(base)
        forward, tensors = choose_forward(self.kind, system, start, solver, options, self.settings)
        return _Chart(system, captured, forward, tensors)

    def _in_charts(
        self, starts: Starts, solver: SolverLike, options: Mapping[str, Any]
    ) -> tuple[Tensor, _Chart]:
        """Solve around y0, and again around where that led for samples that it led far away."""
        chart = self._chart(starts.first, solver, options)
        self._check_adjoint(chart.forward, chart.tensors)
        rest, far = self._run(starts.first, *self._with_starts(chart, starts))
        for _ in range(_CHARTS - 1):
            if not bool(_functorch.plain(far).any()):
                break
            chart = self._chart(rest.base, solver, options)
            later, further = self._run(rest.base, chart.forward, chart.tensors)
            rest, far = _continued(rest, later, far), far & further
        chart = self._chart(rest.base, solver, options)
        return rest.base, self._settled(chart, chart.forward, chart.tensors, rest)

    def _check_adjoint(self, forward: Forward, tensors: tuple[Tensor, ...]) -> None:
        """What the adjoint needs of the solver, before it runs."""
        adjoint = self.settings.adjoint
        if adjoint.needs_iterations:
            forward.iterations(tensors, repr(adjoint))
        if adjoint.needs_resolve:
            forward.resolver(tensors, repr(adjoint))

    def _with_starts(self, chart: _Chart, starts: Starts) -> tuple[Forward, tuple[Tensor, ...]]:
        """The forward that tries all starts, in the chart of the first."""
        if not starts.others.shape[0]:
            return chart.forward, chart.tensors
        others = self.atlas.coordinates(starts.first.expand_as(starts.others), starts.others)
        in_chart = Starts(chart.system.shape, chart.tensors[0], others, None)
        return in_chart.in_turn(chart.forward, chart.tensors, chart.system, self.settings)

    def _run(self, base: Tensor, forward: Forward, tensors: tuple[Tensor, ...]) -> tuple[_Rest, Tensor]:
        """One run of the solver in the chart at ``base``; which samples it led far from there."""
        with outside_inference_mode(), torch.no_grad():
            z, _, outcome = run_forward(forward, tensors)
            point = self.atlas.project(self.atlas.point(base, z))
            finite = point.isfinite().all(-1)
            far = finite & (self.atlas.distance(base, z) > _FAR)
            return _Rest(torch.where(finite.unsqueeze(-1), point, base), finite, outcome), far

    def _by_function(
        self, base: Tensor, solver: Callable[..., Any], options: Mapping[str, Any]
    ) -> tuple[Tensor, _Chart]:
        """The solver function of the user's own returns points, and is called once."""
        arguments, _ = open_arguments(self.args)
        packed = StructuredSolver(solver, self.atlas.structure)
        points = System(self.conditions, arguments, SystemShape.of(base, 1))
        forward, tensors = choose_forward(self.kind, points, base, packed, options, self.settings)
        self._check_adjoint(forward, tensors)
        with outside_inference_mode(), torch.no_grad():
            y, _, outcome = run_forward(forward, tensors)
            y = self.atlas.checked(f"{name_of(solver)} returned y", y)
        finite = y.isfinite().all(-1)
        rest = _Rest(torch.where(finite.unsqueeze(-1), y, base), finite, outcome)
        system, captured = self._system(rest.base)
        return rest.base, self._settled(_Chart(system, captured, forward, tensors), forward, tensors, rest)

    def _settled(self, chart: _Chart, forward: Forward, tensors: tuple[Tensor, ...], rest: _Rest) -> _Chart:
        """The chart at the solution, where nothing is left to solve."""
        z = torch.where(rest.finite.unsqueeze(-1), self.atlas.start(rest.base), torch.nan)
        return replace(chart, forward=SettledForward(forward, rest.outcome), tensors=(z, *tensors))


def _continued(first: _Rest, later: _Rest, far: Tensor) -> _Rest:
    """Samples that had gone far as the later run left them, the others as they were."""
    base = torch.where(far.unsqueeze(-1), later.base, first.base)
    finite = torch.where(far, later.finite, first.finite)
    return _Rest(base, finite, continued(first.outcome, later.outcome, _functorch.plain(far).reshape(-1)))
