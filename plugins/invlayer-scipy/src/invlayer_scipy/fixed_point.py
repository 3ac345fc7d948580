"""Adapter for ``scipy.optimize.fixed_point``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from scipy import optimize

from invlayer_core import SampleProblem, Solver, SolverResult
from invlayer_scipy.options import check_names

__all__ = ["FixedPoint"]


@dataclass
class _Trail:
    """T, counting its evaluations and remembering the last one."""

    problem: SampleProblem
    last: np.ndarray
    steps: int = 0

    def step(self, y: np.ndarray) -> np.ndarray:
        self.last, self.steps = y, self.steps + 1
        moved: np.ndarray = y + self.problem.residual(y)
        return moved


@final
@dataclass(frozen=True)
class FixedPoint(Solver):
    """``scipy.optimize.fixed_point``: iteration of T, accelerated by Aitken's Δ² element by element.

    Options are SciPy's: ``xtol``, ``maxiter``, and ``method`` (``"del2"`` or ``"iteration"``).
    """

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y with T(y) = y; success and message are SciPy's, iterations the evaluations of T.

        Raises
        ------
        TypeError
            If an option is unknown.
        ValueError
            If the method is unknown.
        """
        check_names(options, ("xtol", "maxiter", "method"), "scipy.fixed_point")
        if (method := options.get("method", "del2")) not in ("del2", "iteration"):
            raise ValueError(
                f"scipy.fixed_point: unknown method {method!r}; accepted are ['del2', 'iteration']."
            )
        trail = _Trail(problem, y0)
        try:
            with np.errstate(all="ignore"):
                y, success, message = optimize.fixed_point(trail.step, y0, **options), True, "converged"
        except RuntimeError as error:
            if "onverge" not in str(error):
                raise  # of T itself
            y, success, message = trail.last, False, str(error)
        return SolverResult(np.asarray(y, dtype=np.float64), success, trail.steps, message)
