"""Rules about failures: they are reported, and stay with the sample that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor

from invlayer_core.certificate import SolveInfo
from invlayer_core.solvers import SampleProblem, Solver, SolverResult, Status
from invlayer_core.testing.oracles import same
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import NotApplicable, Subject
from invlayer_core.testing.zoo import square

if TYPE_CHECKING:
    import numpy as np

__all__ = ["exceptions", "nan_args", "no_root"]

_BAD: Final = 1  # the sample that fails, of the 4 of square()


@rule
def exceptions(subject: Subject) -> str:
    """An exception that F raises for one sample fails that sample, and changes no other."""
    if subject.solver.batched:
        raise NotApplicable("one call of a batched solver serves all samples; none has exceptions of its own")
    found = []
    for kind in subject.kinds:
        case = subject.suited(square())
        healthy, _ = subject.solve(case, kind)
        y, info = subject.solve(case, kind, solver=_Interrupted(subject.solver))
        _require_contained(y, info, healthy, f"an exception in F ({kind})")
        if info.status[_BAD] is Status.FALSE_CONVERGENCE:
            raise Violation(
                "a solve that F interrupts to fail",
                "success=True",
                "Do not catch what F raises, or report it.",
            )
        found.append(info.status[_BAD].name)
    return f"the sample is {' or '.join(dict.fromkeys(found))}, the others bitwise as without it"


@final
@dataclass(frozen=True)
class _Interrupted(Solver):
    """The solver, with an F that raises from its third evaluation on, for one sample."""

    solver: Solver

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        if problem.index == _BAD:
            calls: list[int] = []
            problem = replace(
                problem,
                residual_function=_raising(problem.residual_function, calls),
                scalar_function=None,
                jacobian_function=_raising(problem.jacobian_function, calls),
                second_derivative_function=_raising(problem.second_derivative, calls),
                parts={name: _raising(part, calls) for name, part in problem.parts.items()},
            )
        return self.solver.solve(problem, y0, options)


def _raising(function: Callable[[Any], Any], calls: list[int]) -> Callable[[Any], Any]:
    def interrupted(y: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise ArithmeticError("F cannot be evaluated here (raised by the conformance kit)")
        return function(y)

    return interrupted


@rule
def no_root(subject: Subject) -> str:
    """A sample without a root, or without a minimum, is never CONVERGED, and changes no other."""
    kinds = [kind for kind in subject.kinds if kind != "least_squares"]
    if not kinds:
        raise NotApplicable("every sum of squares has a least value, or comes near one")
    return _spoiled(subject, kinds, -2.5, "a sample without a root")


@rule
def nan_args(subject: Subject) -> str:
    """NaN in the args of one sample fails that sample, and changes no other."""
    return _spoiled(subject, subject.kinds, torch.nan, "NaN in the args of a sample")


def _spoiled(subject: Subject, kinds: Sequence[str], shift: float, what: str) -> str:
    found = []
    for kind in kinds:
        case = subject.suited(square())
        healthy, _ = subject.solve(case, kind)
        spoiled = case.shifted(shift, _BAD)
        y, info = subject.solve(spoiled, kind)
        _require_contained(y, info, healthy, f"{what} ({kind})")
        _require_failure_alone(*subject.solve(spoiled.select(_BAD), kind), f"{what}, alone ({kind})")
        found.append(info.status[_BAD].name)
    return f"the sample is {' or '.join(dict.fromkeys(found))}, the others bitwise as without it"


def _require_failure_alone(y: Tensor, info: SolveInfo, what: str) -> None:
    """One system of shape ``(n,)`` that fails is still one system."""
    if y.ndim != 1 or info.status[0].ok:
        raise Violation(
            f"{what} to fail, with y of shape (n,)",
            f"{info.status[0].name}, with y of shape {tuple(y.shape)}",
            "Return SolverResult(y=<the last iterate, in the shape of y0>, success=False, message=...).",
        )


def _require_contained(y: Tensor, info: SolveInfo, healthy: Tensor, what: str) -> None:
    status = info.status[_BAD]
    if status.ok or status is Status.WRONG_SHAPE:
        raise Violation(
            f"{what} to give success=False or an exception",
            f"{status.name}: {info.message[_BAD]}",
            "Return SolverResult(y=<the last iterate>, success=False, message=...).",
        )
    others = torch.arange(len(y)) != _BAD
    if not same(y[others], healthy[others]):
        changed = [i for i in range(len(y)) if i != _BAD and not same(y[i], healthy[i])]
        raise Violation(
            f"{what} to leave the other samples bitwise as they are",
            f"samples {changed} changed, statuses {[info.status[i].name for i in changed]}",
            "Keep no state between calls of solve(), and decide convergence for each sample alone.",
        )
