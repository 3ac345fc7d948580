"""Every solver of the plugin keeps the rules of the conformance kit for cone programs."""

import cvxpy as cp
import pytest

import invlayer_core as inv
from invlayer_core.testing.pytest_case import ConeConformance


class TestClarabel(ConeConformance):
    spec = "cvxpy.clarabel"


class TestSCS(ConeConformance):
    spec = "cvxpy.scs"


class TestOSQP(ConeConformance):
    spec = "cvxpy.osqp"


class TestHiGHS(ConeConformance):
    spec = "cvxpy.highs"


OTHERS = ("ecos", "piqp", "qoco", "mosek", "gurobi")


@pytest.mark.parametrize("name", [name for name in OTHERS if name.upper() in cp.installed_solvers()])
def test_solvers_through_cvxpy(name: str) -> None:
    report = inv.testing.check_solver(f"cvxpy.{name}")
    assert [result.rule for result in report.results if not result.passed] == ["cone_threads"]


def test_a_cone_that_cvxpy_does_not_hand_over() -> None:
    from invlayer_core.testing.cone_programs import cone_cases

    (case,) = (case for case in cone_cases() if case.name == "power")
    with pytest.raises(inv.ConditionsError, match=r"CVXPY with ECOS came with .* the cones power"):
        inv.cone_program(*case.data(case.c), case.structure, solver="cvxpy.ecos")
