"""Every solver keeps every rule of the conformance kit."""

from typing import ClassVar

import pytest

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


class TestNewton(SolverConformance):
    spec = "scipy.newton"


@pytest.mark.slow  # a sibling runs always
class TestHalley(SolverConformance):
    spec = "scipy.newton"
    options: ClassVar = {"method": "halley"}


@pytest.mark.slow  # a sibling runs always
class TestSecant(SolverConformance):
    spec = "scipy.newton"
    options: ClassVar = {"method": "secant"}


class TestBrentq(SolverConformance):
    spec = "scipy.brentq"


@pytest.mark.slow  # a sibling runs always
class TestBrenth(SolverConformance):
    spec = "scipy.brenth"


@pytest.mark.slow  # a sibling runs always
class TestRidder(SolverConformance):
    spec = "scipy.ridder"


@pytest.mark.slow  # a sibling runs always
class TestBisect(SolverConformance):
    spec = "scipy.bisect"


class TestToms748(SolverConformance):
    spec = "scipy.toms748"


class TestFindRoot(SolverConformance):
    """Without a bracket, so that it looks for one."""

    spec = "scipy.find_root"


@pytest.mark.slow  # a sibling runs always
class TestFixedPointIteration(SolverConformance):
    spec = "scipy.fixed_point"
    options: ClassVar = {"method": "iteration", "xtol": 1e-9}


class TestSolveIvp(SolverConformance):
    spec = "scipy.solve_ivp"


class TestFixedPointDel2(SolverConformance):
    spec = "scipy.fixed_point"


class TestMinimize(SolverConformance):
    """BFGS, and SLSQP where there are constraints."""

    spec = "scipy.minimize"


@pytest.mark.slow  # a sibling runs always
class TestMinimizeWithHessian(SolverConformance):
    spec = "scipy.minimize"
    options: ClassVar = {"method": "trust-exact"}
    kinds = ("minimize",)


@pytest.mark.slow  # a sibling runs always
class TestMinimizeWithoutGradient(SolverConformance):
    spec = "scipy.minimize"
    options: ClassVar = {"method": "nelder-mead"}
    kinds = ("minimize",)
    tolerance = 1e-5


class TestMinimizeScalar(SolverConformance):
    """Brent's method stops at the square root of rounding."""

    spec = "scipy.minimize_scalar"
    tolerance = 1e-5


class TestLeastSquares(SolverConformance):
    spec = "scipy.least_squares"


@pytest.mark.slow  # a sibling runs always
class TestLeastSquaresOfMinpack(SolverConformance):
    spec = "scipy.least_squares"
    options: ClassVar = {"method": "lm"}
