"""SciPy's linear programs for invlayer; and what there is to say of mixed-integer ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

import invlayer_core as inv

__all__ = ["LinProg", "Milp"]


@final
class LinProg(inv.Solver):
    """``scipy.optimize.linprog`` for programs without P; options: its ``method`` and ``options``."""

    def solve(
        self, problem: inv.QuadraticProblem, y0: np.ndarray, options: Mapping[str, Any]
    ) -> inv.SolverResult:
        unknown = sorted(set(options) - {"method", "options"})
        if unknown:
            raise TypeError(
                f"scipy.linprog: unknown options {', '.join(unknown)}; accepted are method and options."
            )
        if problem.P is not None:
            raise inv.ConditionsError(
                "qp(solver='scipy.linprog'): that solver is for linear programs, and P is given. Accepted is "
                "P=None; or a solver of quadratic programs, such as 'qpsolvers.clarabel' or 'torch.qp'."
            )
        found = linprog(
            problem.q,
            A_ub=_matrix(problem.G),
            b_ub=problem.h,
            A_eq=_matrix(problem.A),
            b_eq=problem.b,
            bounds=_bounds(problem),
            **options,
        )
        if found.x is None:
            return inv.SolverResult(y=problem.answer(None), success=False, message=str(found.message))
        return inv.SolverResult(
            y=problem.answer(found.x, **_multipliers(found)),
            success=bool(found.success),
            iterations=int(getattr(found, "nit", -1)),
            message=str(found.message),
        )


def _matrix(given: Any) -> Any:
    if isinstance(given, inv.CoordinateMatrix):
        return coo_matrix((given.values, (given.rows, given.columns)), shape=given.shape).tocsc()
    return given


def _bounds(problem: inv.QuadraticProblem) -> np.ndarray:
    """``(n, 2)``; linprog by itself would assume x ≥ 0."""
    nothing = np.full(problem.size, np.inf)
    lower = -nothing if problem.lb is None else problem.lb
    upper = nothing if problem.ub is None else problem.ub
    return np.stack([lower, upper], 1)


def _multipliers(found: Any) -> dict[str, Any]:
    """Those of HiGHS, which calls them marginals: the derivatives of the minimum by each limit."""
    if not hasattr(found, "eqlin"):
        return {}
    return {
        "equality": -found.eqlin.marginals,
        "inequality": -found.ineqlin.marginals,
        "lower": found.lower.marginals,
        "upper": -found.upper.marginals,
    }


@final
class Milp(inv.Solver):
    """``scipy.optimize.milp``, registered so that asking for it says why it cannot be differentiated so."""

    def solve(
        self, problem: inv.QuadraticProblem, y0: np.ndarray, options: Mapping[str, Any]
    ) -> inv.SolverResult:
        raise inv.ConditionsError(
            "qp(solver='scipy.milp'): the solution of a mixed-integer program has no multipliers and is a "
            "piecewise constant function of its arguments: there is no derivative to give. Accepted is a "
            "function of your own around scipy.optimize.milp, with an adjoint that smooths by solving again: "
            "adjoint=inv.adjoints.DLM(resolve=True)."
        )
