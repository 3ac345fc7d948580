"""Adapter for ``scipy.optimize.least_squares``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
from scipy import optimize

from invlayer_core import SampleProblem, Solver, SolverResult
from invlayer_scipy.options import check_names

__all__ = ["LeastSquares"]

_OPTIONS: Final = (
    *("method", "ftol", "xtol", "gtol", "x_scale", "diff_step", "tr_solver", "tr_options"),
    *("max_nfev", "verbose", "jac", "loss"),
)
_TIGHT: Final = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}


@final
class LeastSquares(Solver):
    """``scipy.optimize.least_squares``: methods ``"trf"`` (default), ``"dogbox"`` and ``"lm"``.

    Options are SciPy's, with ``jac`` True (the analytic Jacobian, default), ``"2-point"``, ``"3-point"`` or
    ``"cs"``. Tolerances default to 1e-15, as a derivative needs an accurate solution.
    """

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Minimise ½‖r(y)‖²; success and message are SciPy's, iterations its evaluations of r.

        Raises
        ------
        TypeError
            If an option is unknown.
        ValueError
            For a robust ``loss``: it would minimise something else than the problem says.
        """
        check_names(options, _OPTIONS, "scipy.least_squares")
        settings = {**_TIGHT, **options}
        loss = settings.pop("loss", "linear")
        if loss != "linear":
            raise ValueError(
                f"scipy.least_squares: loss={loss!r} would minimise another objective than the one that is "
                "differentiated. Accepted is 'linear'; put a robust loss into the residuals, or minimise its "
                "sum with inv.minimize."
            )
        jacobian = settings.pop("jac", True)
        with np.errstate(all="ignore"):
            found = optimize.least_squares(
                problem.residuals,
                y0,
                jac=problem.residuals_jacobian if jacobian is True else jacobian,
                **settings,
            )
        return SolverResult(
            y=found.x,
            success=bool(found.success),
            iterations=int(found.nfev),
            message=str(found.message),
            aux={
                "cost": float(found.cost),
                "optimality": float(found.optimality),
                "status": int(found.status),
            },
        )
