"""What a traced operator runs: one problem of any kind, on a flat list of tensors.

Conditions may be an ``nn.Module``. Its parameters are then inputs of the traced graph like any other, behind
the tensors of the args, and while F is evaluated each stands where the module has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.adjoints.adjoint import Solved
from invlayer_core.call import CommonKeywords, SolverLike, name_of, solve_from_guess
from invlayer_core.captured import Substitution
from invlayer_core.certificate import SolveInfo
from invlayer_core.compiled.template import fill_in
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import CallableForward
from invlayer_core.implicit import Settings, solve_implicitly
from invlayer_core.solvers.direct import is_factors
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["FromGuess", "OwnSolver", "TracedCall", "TracedProblem", "module_of"]


def module_of(function: Any) -> torch.nn.Module | None:
    """The module whose parameters ``function`` reads: itself, or that of a bound method."""
    if isinstance(function, MethodType):
        function = function.__self__
    return function if isinstance(function, torch.nn.Module) else None


@final
@dataclass(frozen=True)
class TracedCall:
    """How functions of ``args`` become functions of the flat tensors of a traced operator.

    Attributes
    ----------
    template : str
        ``args``, with gaps.
    parameters : tuple of Tensor
        The module's own parameters, for which the last of the tensors stand.
    """

    template: str
    parameters: tuple[Tensor, ...]

    def args(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The args that the first of the tensors make."""
        return fill_in(self.template, tensors)

    def lift(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(y, *args)`` as a function of y and the flat tensors."""

        @_named_like(function)
        def lifted(y: Tensor, *tensors: Tensor) -> Any:
            return self._run(function, (y,), tensors)

        return lifted

    def lift_solver(self, solver: Callable[..., Any], *, from_guess: bool) -> Callable[..., Any]:
        """A solver function as one of (y0 and) the flat tensors."""

        @_named_like(solver)
        def lifted(*tensors: Tensor) -> Any:
            start = tensors[:1] if from_guess else ()
            return self._run(solver, start, tensors[len(start) :])

        return lifted

    def _run(self, function: Callable[..., Any], start: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        args = self.args(tensors)
        if not self.parameters:
            return function(*start, *args)
        with Substitution(self.parameters, tensors[-len(self.parameters) :]):
            return function(*start, *args)


def _named_like(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def rename(lifted: Callable[..., Any]) -> Callable[..., Any]:
        lifted.__qualname__ = name_of(function)
        return lifted

    return rename


@dataclass(frozen=True)
class TracedProblem(ABC):
    """A problem with everything but its tensors."""

    conditions: Callable[..., Tensor]
    jacobian: Callable[..., Tensor] | None
    keywords: CommonKeywords
    module: torch.nn.Module | None

    guesses = 0  # how many of the tensors stand before θ: 1 where there is a y0

    @property
    def settings(self) -> Settings:
        return Settings(**self.keywords)

    def call(self, template: str) -> TracedCall:
        parameters = () if self.module is None else tuple(self.module.parameters())
        return TracedCall(template, parameters)

    @abstractmethod
    def solve(self, call: TracedCall, tensors: Sequence[Tensor]) -> tuple[Tensor, SolveInfo]:
        """y*, and what is known about every sample."""

    def pull_back(
        self,
        call: TracedCall,
        y: Tensor,
        dead: Tensor | None,
        cotangent: Tensor,
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """The cotangents of the tensors that are wanted, by the layer's own adjoint."""
        settings = self.settings
        theta = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        jacobian = None if self.jacobian is None else call.lift(self.jacobian)
        system = System(
            call.lift(self.conditions),
            Arguments.flatten(tuple(theta[self.guesses :])),
            SystemShape.of(y, settings.event_dims),
            jacobian=jacobian,
            chunk_size=settings.adjoint.chunk_size,
        )
        dead_value = 0.0 if settings.on_failure == "zero_grad" else torch.nan
        attached = settings.adjoint.attach(Solved(system, y.detach(), dead, dead_value))
        inputs = [t for t, want in zip(theta, wanted, strict=True) if want]
        return list(
            torch.autograd.grad(attached, inputs, cotangent, allow_unused=True, materialize_grads=True)
        )


@final
@dataclass(frozen=True)
class FromGuess(TracedProblem):
    """Root and fixed point: the tensors are ``(y0, *θ)``."""

    kind: str
    solver: SolverLike
    options: Mapping[str, Any] | None

    guesses = 1

    def solve(self, call: TracedCall, tensors: Sequence[Tensor]) -> tuple[Tensor, SolveInfo]:
        solver = self.solver
        if not isinstance(solver, str) and callable(solver):
            solver = call.lift_solver(solver, from_guess=True)
        jacobian = None if self.jacobian is None else call.lift(self.jacobian)
        keywords: CommonKeywords = {**self.keywords, "return_info": True}
        y0, *theta = tensors
        result: tuple[Tensor, SolveInfo] = solve_from_guess(
            self.kind, call.lift(self.conditions), y0, tuple(theta), solver, self.options, jacobian, keywords
        )
        return result


@final
@dataclass(frozen=True)
class OwnSolver(TracedProblem):
    """Inverse and implicit function: the user's solver takes the args; the tensors are θ."""

    function: Callable[..., Any]
    measurable: bool = True

    def solve(self, call: TracedCall, tensors: Sequence[Tensor]) -> tuple[Tensor, SolveInfo]:
        settings = replace(self.settings, return_info=True)
        arguments = Arguments.flatten(tuple(tensors))
        function = call.lift_solver(self.function, from_guess=False)
        forward = CallableForward(
            function, arguments, settings.event_dims, has_aux=True, name=name_of(function)
        )
        jacobian = None if self.jacobian is None else call.lift(self.jacobian)
        solution = solve_implicitly(
            call.lift(self.conditions), arguments, forward, arguments.tensors, settings,
            jacobian=jacobian, measurable=self.measurable,
        )  # fmt: skip
        if solution.outcome.structure is not None:
            raise ConditionsError(
                f"{forward.name} returned something else than one real tensor inside torch.compile or "
                "torch.export. Accepted there is one real floating-point tensor."
            )
        if solution.outcome.aux and not is_factors(solution.outcome.aux[0]):
            raise ConditionsError(
                f"{forward.name} returned (y, aux) inside torch.compile or torch.export, where only tensors "
                "can be passed on. Accepted there is a solver function that returns y alone."
            )
        assert solution.info is not None
        return solution.y, solution.info
