"""Rules for solvers of cone programs about what they return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.functional.cone_program import cone_program
from invlayer_core.solvers import SolverResult, Status
from invlayer_core.solvers.cone import ConeProblem
from invlayer_core.testing.cone_programs import cone_cases, infeasible_program, unbounded_program
from invlayer_core.testing.cone_solves import POLISHED, call, gap_of, known_cases, program_of, solve
from invlayer_core.testing.oracles import derivatives, same
from invlayer_core.testing.rules.cone_calls import (
    cone_pickling,
    cone_threads,
    program_unchanged,
    start,
    unknown_cone_option,
)
from invlayer_core.testing.rules.loading import batched_flag, loading
from invlayer_core.testing.rules.registration import registration
from invlayer_core.testing.rules.rule import Rule, Violation, rule
from invlayer_core.testing.subject import Subject

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CONE_RULES"]

_LOOSE = 1e-3  # what the solver's own answer has to reach


@rule
def cones(subject: Subject) -> str:
    """Programs with every cone are solved, or refused by an error that names the cone."""
    solved, refused, worst = [], [], 0.0
    for case in cone_cases():
        try:
            call(subject, program_of(case))
        except ConditionsError as error:
            if case.name not in str(error):
                raise Violation(f"an error that names the cone {case.name}", str(error), _REFUSE) from error
            refused.append(case.name)
            continue
        found, info = solve(subject, case, case.c)
        gap = gap_of(found.x, case.exact(case.c))
        if not bool(info.ok.all()) or not gap <= POLISHED:
            raise Violation(
                f"the solution of a program with the cone {case.name} to {POLISHED:g}",
                f"{info.status[0].name}, {gap:.1e} away ({info.message[0]})",
                _REFUSE,
            )
        solved.append(case.name)
        worst = max(worst, gap)
    if not solved:
        raise Violation("a solver that knows a cone", "errors for all", "See the messages of its errors.")
    without = f"; refused: {', '.join(refused)}" if refused else ""
    return f"{', '.join(solved)} to {worst:.0e}{without}"


_REFUSE = (
    "Return problem.joined(x, y, s) in the layout that Cones tells; or raise ConditionsError with the names "
    "of the cones that the solver does not know."
)


@rule
def signs_and_layouts(subject: Subject) -> str:
    """x, y and s as solve() returns them satisfy P x + q + Aᵀy = 0 and A x + s = b, with y ∈ K*, s ∈ K."""
    worst = 0.0
    for case in known_cases(subject):
        problem = program_of(case)
        found = call(subject, problem)
        _check_fields(found, problem)
        gap = float(abs(problem.residual(_as_array(found.y))).max())
        if not gap <= _LOOSE:
            raise Violation(
                f"the optimality conditions to {_LOOSE:g}, before any polish (cone {case.name})",
                f"{gap:.1e}",
                "Turn the sign of y, or put its entries, or those of s, in the order that Cones tells.",
            )
        worst = max(worst, gap)
    return f"residuals up to {worst:.0e}, unpolished"


def _check_fields(found: Any, problem: ConeProblem) -> None:
    if not isinstance(found, SolverResult):
        raise Violation("a SolverResult", type(found).__name__, "Return one.")
    if tuple(found.y.shape) != (problem.size,) or not found.success or not found.message:
        raise Violation(
            f"y of shape ({problem.size},), success=True and a message",
            f"y of shape {tuple(found.y.shape)}, success={found.success}, message={found.message!r}",
            "Return SolverResult(y=problem.joined(x, y, s), success=..., message=<the library's own words>).",
        )


def _as_array(y: Any) -> np.ndarray:
    array: np.ndarray = y.numpy() if isinstance(y, Tensor) else y
    return array


@rule
def cone_gradients(subject: Subject) -> str:
    """First and second derivatives are those of the closed form."""
    worst = [0.0, 0.0]
    for case in known_cases(subject):
        c = case.c.clone().requires_grad_()
        ours = derivatives(lambda c, case=case: solve(subject, case, c)[0].x, [c])
        theirs = derivatives(case.exact, [c])
        for order in (0, 1):
            gap = gap_of(ours[order][0], theirs[order][0])
            if not gap <= 1e-6:
                raise Violation(
                    f"the {('first', 'second')[order]} derivative with the cone {case.name} to 1e-6",
                    f"{gap:.1e}",
                    "See the rules 'cones' and 'signs_and_layouts' first.",
                )
            worst[order] = max(worst[order], gap)
    return f"first to {worst[0]:.0e}, second to {worst[1]:.0e}"


@rule
def cone_batch(subject: Subject) -> str:
    """A batch is its samples, and one that cannot be solved leaves the others alone."""
    count = 0
    for case in known_cases(subject):
        c = case.c.roll(1, 0)
        whole, _ = solve(subject, case, torch.cat([case.c, c]))
        for i in range(2):
            alone, _ = solve(subject, case, case.c[i])
            gap = max(gap_of(part[i], single) for part, single in zip(whole, alone, strict=True))
            if not gap <= POLISHED:
                raise Violation(
                    "each sample as if it were alone", f"{gap:.1e} ({case.name})", "Keep no state."
                )
        spoiled = torch.cat([case.c, torch.full_like(c[:1], torch.nan), c[1:]])
        others, info = solve(subject, case, spoiled)
        kept = [0, 1, 3]
        if info.ok.tolist() != [True, True, False, True] or not same(others.x[kept], whole.x[kept]):
            raise Violation(
                f"one sample of NaN to fail alone, the others bitwise as they were ({case.name})",
                f"ok={info.ok.tolist()}",
                "Treat every sample by itself; raise, or return success=False, for one that is no program.",
            )
        count += 1
    return f"{count} batches of four, one spoiled"


@rule
def no_solution(subject: Subject) -> str:
    """Infeasible and unbounded programs are reported as such, with a message, and never as solved."""
    said = []
    for what, (structure, data) in (("infeasible", infeasible_program()), ("unbounded", unbounded_program())):
        _, info = cone_program(
            *data, structure, solver=subject.solver, options=dict(subject.options), on_failure="nan",
            return_info=True,
        )  # fmt: skip
        if info.status[0] is not Status.NO_SOLUTION or not info.message[0]:
            raise Violation(
                f"NO_SOLUTION, with a message, for an {what} program",
                f"{info.status[0].name}: {info.message[0]!r}",
                "Return SolverResult(success=False, no_solution=True, message=<the library's own words>).",
            )
        said.append(info.message[0])
    return "; ".join(said)


CONE_RULES: Final[tuple[Rule, ...]] = (
    loading,
    batched_flag,
    cones,
    signs_and_layouts,
    cone_gradients,
    cone_batch,
    no_solution,
    start,
    unknown_cone_option,
    program_unchanged,
    cone_threads,
    cone_pickling,
    registration,
)
"""The rules for the kind ``"cone"``, in the order in which they are applied."""
