"""Every registered solver keeps every rule of the conformance kit."""

from typing import ClassVar

import pytest

from invlayer_core.testing.pytest_case import SolverConformance


class TestNewton(SolverConformance):
    spec = "casadi.rootfinder"


@pytest.mark.slow  # a sibling runs always
class TestFastNewton(SolverConformance):
    spec = "casadi.rootfinder"
    options: ClassVar = {"plugin": "fast_newton"}


@pytest.mark.slow  # a sibling runs always
class TestKinsol(SolverConformance):
    spec = "casadi.rootfinder"
    options: ClassVar = {"plugin": "kinsol", "abstol": 1e-8}


@pytest.mark.slow  # a sibling runs always
class TestNlpsol(SolverConformance):
    spec = "casadi.rootfinder"
    options: ClassVar = {"plugin": "nlpsol", "nlpsol_options": {"ipopt.tol": 1e-10}}


class TestIpopt(SolverConformance):
    spec = "casadi.ipopt"


@pytest.mark.slow  # a sibling runs always
class TestSqpmethod(SolverConformance):
    spec = "casadi.sqpmethod"
