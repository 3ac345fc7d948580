"""The conformance kit for quadratic programs: torch.qp keeps its rules, and bad adapters break them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.quadratic.programs import TryAll

import invlayer_core as inv
from invlayer_core.testing.pytest_case import ProgramConformance


class TestTorchQP(ProgramConformance):
    spec = "torch.qp"


class Turned(TryAll):
    """Multipliers with the wrong sign."""

    def solve(self, problem: Any, y0: Any, options: Any) -> inv.SolverResult:
        found = super().solve(problem, y0, options)
        y = np.array(found.y)
        if problem.b is not None:
            y[problem.size : problem.size + len(problem.b)] *= -1
        return inv.SolverResult(y=y, success=found.success, message=found.message)


class Mute(TryAll):
    """Fails without a word."""

    def solve(self, problem: Any, y0: Any, options: Any) -> inv.SolverResult:
        found = super().solve(problem, y0, options)
        return inv.SolverResult(y=found.y, success=found.success)


class Idle(inv.Solver):
    """Does nothing."""

    def solve(self, problem: Any, y0: Any, options: Any) -> inv.SolverResult:
        return inv.SolverResult(y=problem.answer(None), success=False, message="idle")


@pytest.mark.parametrize(
    ("adapter", "broken"),
    [("TryAll", None), ("Turned", "multipliers"), ("Mute", "no_solution"), ("Idle", "solutions")],
)
def test_rules_can_fail(adapter: str, broken: str | None) -> None:
    module = "tests.quadratic.programs" if adapter == "TryAll" else __name__
    spec = inv.SolverSpec(name=f"test.{adapter.lower()}", factory=f"{module}:{adapter}", kinds=("qp",))
    if broken is None:
        report = inv.testing.check_solver(spec)
        assert [r.rule for r in report.results if not r.passed] == ["registration"]
        return
    with pytest.raises(inv.testing.ConformanceError, match=broken):
        inv.testing.check_solver(spec)
