"""An adapter for ``scipy.integrate.solve_ivp``, as a solver for steady states."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from scipy.integrate import solve_ivp

from invlayer_core import SampleProblem, Solver, SolverResult
from invlayer_scipy.options import check_names

__all__ = ["SolveIvp"]

_IMPLICIT: Final = ("Radau", "BDF")
_METHODS: Final = ("RK45", "RK23", "DOP853", *_IMPLICIT)
_OPTIONS: Final = ("method", "rtol", "atol", "first_step", "max_step", "rest", "until", "maxiter")


class _GaveUp(Exception):  # noqa: N818 (no error: what became of one solve)
    """Ends an integration at ``y``."""

    def __init__(self, message: str, y: np.ndarray, steps: int) -> None:
        super().__init__(message)
        self.y, self.steps = y.copy(), steps


@final
@dataclass(frozen=True)
class SolveIvp(Solver):
    """``scipy.integrate.solve_ivp``: follows dy/dt = T(y) − y from y0 until it rests.

    So a steady state of dy/dt = f(y) is the fixed point of T(y) = y + f(y), and only those are found that
    attract: where an eigenvalue of ∂f/∂y has a positive real part the flow runs away. Options are SciPy's
    ``method`` (default ``"BDF"``, which takes the analytic Jacobian), ``rtol`` (1e-6), ``atol`` (1e-10),
    ``first_step``, ``max_step``; ``rest`` (1e-9), the ‖dy/dt‖∞ at which it ends; and where it gives up:
    ``until`` (1e6), a time, and ``maxiter`` (5000), a number of steps. In float32 the tolerances are wider.
    """

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        return options.get("method", "BDF") in _IMPLICIT

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y with T(y) = y; success means that the flow came to rest, iterations are its steps.

        Raises
        ------
        TypeError
            If an option is unknown.
        ValueError
            If the method is unknown; LSODA, whose code serves one solve at a time, is not accepted.
        """
        check_names(options, _OPTIONS, "scipy.solve_ivp")
        settings = {**_defaults(problem.precision), **options}
        if settings["method"] not in _METHODS:
            raise ValueError(
                f"scipy.solve_ivp: unknown method {settings['method']!r}; accepted are {list(_METHODS)}."
            )
        rest, until, maxiter = (settings.pop(name) for name in ("rest", "until", "maxiter"))
        if settings["method"] in _IMPLICIT:
            settings["jac"] = lambda _time, y: problem.jacobian(y)
        with np.errstate(all="ignore"):
            if _speed(problem, y0) <= rest:
                return SolverResult(y0, True, 0, "y0 is at rest")
            try:
                flow = solve_ivp(
                    lambda _time, y: problem.residual(y), (0.0, until), y0,
                    events=_at_rest(problem, rest, maxiter), **settings,
                )  # fmt: skip
            except _GaveUp as gave_up:
                return SolverResult(gave_up.y, False, gave_up.steps, str(gave_up))
            counts = {"time": float(flow.t[-1]), "nfev": int(flow.nfev), "njev": int(flow.njev)}
            return SolverResult(flow.y[:, -1], flow.status == 1, len(flow.t) - 1, str(flow.message), counts)


def _defaults(precision: float) -> dict[str, Any]:
    """None below what F itself is exact to."""
    return {
        "method": "BDF",
        "rtol": max(1e-6, 100 * precision),
        "atol": max(1e-10, 10 * precision),
        "rest": max(1e-9, 100 * precision),
        "until": 1e6,
        "maxiter": 5000,
    }


def _speed(problem: SampleProblem, y: np.ndarray) -> float:
    return float(np.abs(problem.residual(y)).max(initial=0.0))


def _at_rest(problem: SampleProblem, rest: float, maxiter: int) -> Callable[[float, np.ndarray], float]:
    """An event of ``solve_ivp``, which looks at it after each step: the flow is slower than ``rest``."""
    steps = itertools.count()

    def event(_time: float, y: np.ndarray) -> float:
        speed, step = _speed(problem, y), next(steps)
        if not np.isfinite(speed):
            raise _GaveUp("the flow ran away", y, step)
        if speed > rest and step >= maxiter:
            raise _GaveUp(f"the flow did not come to rest in maxiter={maxiter} steps", y, step)
        return speed - rest

    event.terminal = True  # type: ignore[attr-defined]
    return event
