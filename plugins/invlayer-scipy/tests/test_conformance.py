"""Both solvers keep every rule of the conformance kit."""

from typing import ClassVar

from invlayer_core.testing.pytest_case import SolverConformance


class TestFsolve(SolverConformance):
    spec = "scipy.fsolve"


class TestFsolveWithoutJacobian(SolverConformance):
    """MINPACK's own step for differences is below the rounding of an F in float32: hence ``epsfcn``."""

    spec = "scipy.fsolve"
    options: ClassVar = {"fprime": None, "epsfcn": 1e-6}


class TestRootHybr(SolverConformance):
    spec = "scipy.root"
    options: ClassVar = {"method": "hybr", "tol": 1e-10}


class TestRootLm(SolverConformance):
    spec = "scipy.root"
    options: ClassVar = {"method": "lm"}
