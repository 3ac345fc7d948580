"""The conformance kit for cone programs: a small solver keeps its rules, and bad ones break them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tests.conditions.test_cone_program import dual_ascent

import invlayer_core as inv
from invlayer_core.testing.rules.cones import CONE_RULES
from invlayer_core.testing.subject import Subject


class Ascent(inv.Solver):
    """Projected gradients on the dual, for strictly convex programs with a diagonal P."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        if options:
            raise TypeError(f"unknown options {sorted(options)}")
        cones = problem.structure.cones
        if cones.exp or cones.power:
            raise inv.ConditionsError(f"{cones}: accepted are none of exp and power")
        if not problem.P.size:
            return self.without_solution(problem, "unbounded")
        z = dual_ascent(problem, 150)
        if np.isnan(z).any():
            return inv.SolverResult(z, False, message="not a number")
        if np.abs(problem.residual(z)).max() > 1e-4:
            return self.without_solution(problem, "infeasible")
        return inv.SolverResult(z, True, 150, "solved")

    def without_solution(self, problem: inv.ConeProblem, why: str) -> inv.SolverResult:
        return inv.SolverResult(np.full(problem.size, np.nan), False, no_solution=True, message=why)


def changed(problem: inv.ConeProblem, found: inv.SolverResult, y: np.ndarray) -> inv.SolverResult:
    return inv.SolverResult(y, found.success, message=found.message, no_solution=found.no_solution)


class Turned(Ascent):
    """The dual variable with the wrong sign."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        found, n = super().solve(problem, y0, options), problem.structure.size
        return changed(problem, found, np.concatenate([found.y[:n], -found.y[n:]]))


class Lower(Ascent):
    """The other triangle of a semidefinite cone."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        found, n = super().solve(problem, y0, options), problem.structure.size
        y = np.array(found.y)
        if problem.structure.cones.psd:
            y[n:] = y[n + np.array([0, 1, 3, 6, 2, 4, 7, 5, 8, 9])]
        return changed(problem, found, y)


class Hopeful(Ascent):
    """Fails without saying that there is no solution."""

    def without_solution(self, problem: inv.ConeProblem, why: str) -> inv.SolverResult:
        return inv.SolverResult(np.zeros(problem.size), True, message="solved")


class Mute(Ascent):
    def without_solution(self, problem: inv.ConeProblem, why: str) -> inv.SolverResult:
        return inv.SolverResult(np.full(problem.size, np.nan), False, no_solution=True)


class Careless(Ascent):
    """Takes any option."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        return super().solve(problem, y0, {})


class Writing(Ascent):
    """Scales the program in place."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        found = super().solve(problem, y0, options)
        problem.b[:] += 0.125
        return found


class Nameless(Ascent):
    """Refuses cones without naming them."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        try:
            return super().solve(problem, y0, options)
        except inv.ConditionsError:
            raise inv.ConditionsError("no") from None


class Remembering(Ascent):
    """Its second answer differs from the first."""

    seen = 0.0

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        found = super().solve(problem, y0, options)
        self.seen += 1e-9
        return changed(problem, found, found.y + self.seen)


def spec(adapter: str) -> inv.SolverSpec:
    return inv.SolverSpec(
        name=f"test.{adapter.lower()}", factory=f"{__name__}:{adapter}", kinds=("cone",), thread_safe=True
    )


def test_a_good_solver_keeps_all_rules() -> None:
    report = inv.testing.check_solver(spec("Ascent"))
    assert [r.rule for r in report.results if not r.passed] == ["registration"]
    assert "zero, nonneg, soc, psd" in report.table()
    assert "refused: exp, power" in report.table()


@pytest.mark.parametrize(
    ("adapter", "rule"),
    [
        ("Turned", "signs_and_layouts"),
        ("Lower", "signs_and_layouts"),
        ("Hopeful", "no_solution"),
        ("Mute", "no_solution"),
        ("Careless", "unknown_cone_option"),
        ("Writing", "program_unchanged"),
        ("Nameless", "cones"),
        ("Remembering", "program_unchanged"),
    ],
)
def test_rules_can_fail(adapter: str, rule: str) -> None:
    (broken,) = (each for each in CONE_RULES if each.name == rule)
    result = broken.apply(Subject.of(spec(adapter), None, None, 1e-6))
    assert result.passed is False
    assert "expected" in result.detail


def test_check_solver_raises() -> None:
    with pytest.raises(
        inv.testing.ConformanceError, match=r"(?s)cones: expected an error that names the cone"
    ):
        inv.testing.check_solver(spec("Nameless"))
