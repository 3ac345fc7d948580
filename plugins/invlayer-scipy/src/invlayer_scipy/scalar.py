"""Adapters for SciPy's scalar root finders: ``newton``, and the bracketing methods.

They solve one equation in one unknown: ``event_dims=0`` makes every element of y one. A bracket goes into
``options`` as ``"bracket": (lo, hi)``, two numbers for all samples, or tensors with one value for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import numpy as np
from scipy import optimize

from invlayer_core import ConditionsError, Problem, SampleProblem, Solver, SolverResult
from invlayer_scipy.options import check_names

__all__ = ["Bisect", "Brenth", "Brentq", "Newton", "Ridder", "Toms748", "check_scalar"]

_GAVE_UP: Final = (
    "onverge",
    "different signs",
    "is NaN",
    "Invalid function value",
)  # what SciPy says of a hard equation


def check_scalar(problem: Problem, name: str) -> None:
    """Refuse a system of several equations.

    Raises
    ------
    ConditionsError
        Naming its size.
    """
    if problem.size != 1:
        raise ConditionsError(
            f"{name} solves scalar equations, and one system here has n = {problem.size} unknowns. Accepted "
            "are event_dims=0, which makes every element of y an equation of its own, and y0 of shape "
            "(*batch, 1)."
        )


class _Scalar:
    """One equation with floats in and out; remembers where it was evaluated last."""

    def __init__(self, problem: SampleProblem, start: float) -> None:
        self.problem, self.last, self.evaluations = problem, start, 0

    def value(self, x: float) -> float:
        self.last, self.evaluations = x, self.evaluations + 1
        return self.problem.value(x)

    def slope(self, x: float) -> float:
        return float(self.problem.jacobian(np.array([x], dtype=np.float64))[0, 0])

    def curvature(self, x: float) -> float:
        return float(self.problem.second_derivative(np.array([x], dtype=np.float64))[0])


def _run(equation: _Scalar, solve: Callable[[], tuple[float, Any]]) -> SolverResult:
    """Call SciPy; where it gives up by an exception, its words become the message."""
    try:
        with np.errstate(all="ignore"):
            root, found = solve()
    except (RuntimeError, ValueError) as error:
        if not any(words in str(error) for words in _GAVE_UP):
            raise  # of an option, or of F itself
        y, success, iterations, message = float(equation.last), False, -1, str(error)
    else:
        y, success, iterations = float(root), bool(found.converged), int(found.iterations)
        message = str(found.flag)
    return SolverResult(
        y=np.array([y]),
        success=success,
        iterations=iterations,
        message=message,
        aux={"function_calls": equation.evaluations},
    )


_NEWTON_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "newton": ("tol", "rtol", "maxiter"),
    "secant": ("tol", "rtol", "maxiter", "x1"),
    "halley": ("tol", "rtol", "maxiter"),
}


@final
@dataclass(frozen=True)
class Newton(Solver):
    """``scipy.optimize.newton``: Newton's, Halley's and the secant method for one equation.

    Options are ``method`` (``"newton"``, ``"halley"`` or ``"secant"``) and SciPy's ``tol``, ``rtol``,
    ``maxiter``, and ``x1`` for the secant method. F′ and F″ are exact, by torch.
    """

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        return options.get("method", "newton") != "secant"

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y with F(y) = 0; success, message and iterations are SciPy's.

        Raises
        ------
        TypeError
            If the method does not know an option.
        ValueError
            If the method is unknown.
        ConditionsError
            If the problem is not scalar.
        """
        settings = dict(options)
        method = settings.pop("method", "newton")
        if method not in _NEWTON_OPTIONS:
            raise ValueError(
                f"scipy.newton: unknown method {method!r}; accepted are {list(_NEWTON_OPTIONS)}."
            )
        check_names(settings, ("method", *_NEWTON_OPTIONS[method]), f"scipy.newton, method={method!r}")
        check_scalar(problem, "scipy.newton")
        equation = _Scalar(problem, float(y0[0]))
        slope = None if method == "secant" else equation.slope
        curvature = equation.curvature if method == "halley" else None
        return _run(
            equation,
            lambda: optimize.newton(
                equation.value, float(y0[0]), slope, fprime2=curvature, full_output=True, **settings
            ),
        )


class _Bracketing(Solver, ABC):
    """What the bracketing methods have in common."""

    name: ClassVar[str]
    accepted: ClassVar[tuple[str, ...]] = ("bracket", "xtol", "rtol", "maxiter")

    @abstractmethod
    def find(self, function: Callable[[float], float], lo: float, hi: float, **settings: Any) -> Any:
        """SciPy's own function."""

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y between the ends of ``options["bracket"]``; y0 gives only the shape.

        Raises
        ------
        TypeError
            If the bracket is missing or is no pair of numbers, or an option is unknown.
        ConditionsError
            If the problem is not scalar.
        """
        settings = dict(options)
        check_names(settings, self.accepted, self.name)
        check_scalar(problem, self.name)
        lo, hi = _bracket(settings.pop("bracket", None), self.name)
        equation = _Scalar(problem, lo)
        return _run(equation, lambda: self.find(equation.value, lo, hi, full_output=True, **settings))


def _bracket(given: Any, name: str) -> tuple[float, float]:
    try:
        lo, hi = (float(end) for end in given)
    except (TypeError, ValueError):
        raise TypeError(
            f'{name}: bracket={given!r}; accepted is options={{"bracket": (lo, hi)}} with two numbers, or '
            "two tensors in the batch shape of y0, between which F changes its sign."
        ) from None
    return lo, hi


@final
@dataclass(frozen=True)
class Brentq(_Bracketing):
    """``scipy.optimize.brentq``: Brent's method, by inverse quadratic extrapolation."""

    name = "scipy.brentq"

    def find(self, function: Callable[[float], float], lo: float, hi: float, **settings: Any) -> Any:
        return optimize.brentq(function, lo, hi, **settings)


@final
@dataclass(frozen=True)
class Brenth(_Bracketing):
    """``scipy.optimize.brenth``: Brent's method, by hyperbolic extrapolation."""

    name = "scipy.brenth"

    def find(self, function: Callable[[float], float], lo: float, hi: float, **settings: Any) -> Any:
        return optimize.brenth(function, lo, hi, **settings)


@final
@dataclass(frozen=True)
class Ridder(_Bracketing):
    """``scipy.optimize.ridder``: Ridders' method."""

    name = "scipy.ridder"

    def find(self, function: Callable[[float], float], lo: float, hi: float, **settings: Any) -> Any:
        return optimize.ridder(function, lo, hi, **settings)


@final
@dataclass(frozen=True)
class Bisect(_Bracketing):
    """``scipy.optimize.bisect``: bisection."""

    name = "scipy.bisect"

    def find(self, function: Callable[[float], float], lo: float, hi: float, **settings: Any) -> Any:
        return optimize.bisect(function, lo, hi, **settings)


@final
@dataclass(frozen=True)
class Toms748(_Bracketing):
    """``scipy.optimize.toms748``: the method of Alefeld, Potra and Shi (1995); takes ``k`` besides."""

    name = "scipy.toms748"
    accepted = (*_Bracketing.accepted, "k")

    def find(self, function: Callable[[float], float], lo: float, hi: float, **settings: Any) -> Any:
        return optimize.toms748(function, lo, hi, **settings)
