"""How the rules for cone programs run a solver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from invlayer_core.certificate import SolveInfo
from invlayer_core.conditions.cone import ConeSolution
from invlayer_core.errors import ConditionsError
from invlayer_core.functional.cone_program import cone_program
from invlayer_core.solvers import SolverResult
from invlayer_core.solvers.cone import ConeProblem
from invlayer_core.testing.cone_programs import ConeCase, cone_cases
from invlayer_core.testing.subject import Subject

__all__ = ["POLISHED", "call", "gap_of", "known_cases", "program_of", "solve"]

POLISHED = 1e-9
"""Relative error that polishing makes of any answer that is near enough."""


def solve(subject: Subject, case: ConeCase, c: Tensor, **keywords: Any) -> tuple[ConeSolution, SolveInfo]:
    """Solve a case through the engine; samples that fail are NaN."""
    settings: dict[str, Any] = {"on_failure": "nan", "return_info": True, "options": dict(subject.options)}
    found: tuple[ConeSolution, SolveInfo] = cone_program(
        *case.data(c), case.structure, solver=subject.solver, **{**settings, **keywords}
    )
    return found


def program_of(case: ConeCase, index: int = 0) -> ConeProblem:
    """One program, as the engine hands it over."""
    P, q, A, b = (part.broadcast_to(2, part.shape[-1])[index].numpy().copy() for part in case.data(case.c))
    return ConeProblem(case.structure, P, q, A, b, index)


def call(subject: Subject, problem: ConeProblem) -> SolverResult:
    """Call the solver itself."""
    return subject.solver.solve(problem, None, dict(subject.options))


def known_cases(subject: Subject) -> Iterator[ConeCase]:
    """The cases with cones that the solver does not refuse."""
    for case in cone_cases():
        try:
            call(subject, program_of(case))
        except ConditionsError:
            continue
        yield case


def gap_of(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, beside the largest entry."""
    return float((found - wanted).detach().abs().max() / max(1.0, float(wanted.detach().abs().max())))
