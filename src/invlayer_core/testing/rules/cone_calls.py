"""Rules for solvers of cone programs about the call itself: options, start, state, threads, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Final

import torch

from invlayer_core.conditions.cone import ConeSolution
from invlayer_core.testing.cone_solves import POLISHED, call, gap_of, known_cases, program_of, solve
from invlayer_core.testing.oracles import same
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import NotApplicable, Subject

__all__ = ["cone_pickling", "cone_threads", "program_unchanged", "start", "unknown_cone_option"]

_NO_SUCH_OPTION: Final = "no_such_option"


@rule
def start(subject: Subject) -> str:
    """A point to start from changes nothing but the iterations."""
    for case in known_cases(subject):
        found, _ = solve(subject, case, case.c)
        again, info = solve(subject, case, case.c, start=ConeSolution(*(part.detach() for part in found)))
        if not bool(info.ok.all()) or not gap_of(again.x, found.x) <= POLISHED:
            raise Violation(
                f"the same solution from start=<the solution> ({case.name})",
                f"{info.status[0].name}, {gap_of(again.x, found.x):.1e} away",
                "Hand problem.start over in the solver's layout, or leave it out.",
            )
    return "from the solution itself, the same solution"


@rule
def unknown_cone_option(subject: Subject) -> str:
    """An option that the solver does not know raises an error that names it."""
    case = next(known_cases(subject))
    try:
        subject.solver.solve(program_of(case), None, {**subject.options, _NO_SUCH_OPTION: 1})
    except Exception as error:
        if _NO_SUCH_OPTION in str(error):
            return f"{type(error).__name__}: {error}"
        raise _swallowed(f"{type(error).__name__} without the name: {error}") from error
    raise _swallowed("no error")


def _swallowed(came: str) -> Violation:
    return Violation(
        f"options={{{_NO_SUCH_OPTION!r}: 1}} to raise an error that names it",
        came,
        "Compare the names in options with those you accept, before solving.",
    )


@rule
def program_unchanged(subject: Subject) -> str:
    """A solve changes no array of its program, and a second one gives the same bits."""
    for case in known_cases(subject):
        problem, before = program_of(case), program_of(case)
        first, second = call(subject, problem), call(subject, problem)
        changed = [
            name for name in ("P", "q", "A", "b") if (getattr(problem, name) != getattr(before, name)).any()
        ]
        if changed:
            raise Violation(
                "P, q, A, b as they were", f"others: {', '.join(changed)}", "Copy before writing."
            )
        if not same(torch.as_tensor(first.y), torch.as_tensor(second.y)):
            raise Violation(f"the same solution twice ({case.name})", "another one", "Keep no state.")
    return "unchanged, and repeated to the bit"


@rule
def cone_threads(subject: Subject) -> str:
    """Programs solved in several threads give what they give one after the other."""
    if not subject.spec.thread_safe:
        raise NotApplicable("SolverSpec(thread_safe=False): two threads never call the solver at once")
    for case in known_cases(subject):
        c = case.c.repeat(4, 1)
        serial, threaded = (solve(subject, case, c, workers=workers)[0] for workers in (1, 4))
        if not same(serial.x, threaded.x):
            raise Violation(
                f"the same bits from four threads ({case.name})", "others", "Share nothing between calls."
            )
    return "four threads, bitwise as one by one"


@rule
def cone_pickling(subject: Subject) -> str:
    """The solver can be copied and pickled, and solves as before."""
    case = next(known_cases(subject))
    expected = call(subject, program_of(case)).y
    for other in (copy.deepcopy(subject.solver), pickle.loads(pickle.dumps(subject.solver))):
        found = other.solve(program_of(case), None, dict(subject.options)).y
        if not same(torch.as_tensor(found), torch.as_tensor(expected)):
            raise Violation("a copy that solves as the original", "another solution", "Keep it simple.")
    return "copied and pickled"
