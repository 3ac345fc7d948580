"""HiGHS: simplex and interior points for linear programs, active sets for quadratic ones (Huangfu 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import highspy
import numpy as np

import invlayer_core as inv
from invlayer_cvxpy.solvers.matrices import as_scipy, refuse_cones

__all__ = ["HiGHS"]

_CONES: Final = {"soc": False, "psd": False, "exp": False, "power": False}
_DEFAULTS: Final = {"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9}


@final
class HiGHS(inv.Solver):
    """``highspy.Highs``; options are its own. Tolerances are 1e-9 instead of 1e-7."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        cones = problem.structure.cones
        refuse_cones("cvxpy.highs", cones, _CONES)
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        for name, value in {**_DEFAULTS, **options}.items():
            if highs.setOptionValue(name, value) != highspy.HighsStatus.kOk:
                raise TypeError(f"cvxpy.highs: option {name}={value!r}; accepted are HiGHS's own options.")
        highs.passModel(_model(problem))
        highs.run()
        status = highs.modelStatusToString(highs.getModelStatus())
        found = highs.getSolution()
        x, y = np.array(found.col_value), -np.array(found.row_dual)
        return inv.SolverResult(
            y=problem.joined(x, y, problem.b - as_scipy(problem.A_matrix) @ x),
            success=status == "Optimal",
            no_solution=status in ("Infeasible", "Unbounded", "Primal infeasible or unbounded"),
            iterations=max(highs.getInfo().simplex_iteration_count, highs.getInfo().qp_iteration_count),
            message=f"HiGHS: {status}",
            aux={"status": status, "objective": highs.getInfo().objective_function_value},
        )


def _model(problem: inv.ConeProblem) -> Any:
    cones, n, m = problem.structure.cones, problem.structure.size, problem.structure.equations
    model, matrix = highspy.HighsModel(), problem.A_matrix
    lp = model.lp_
    lp.num_col_, lp.num_row_ = n, m
    lp.col_cost_ = problem.q
    lp.col_lower_, lp.col_upper_ = np.full(n, -highspy.kHighsInf), np.full(n, highspy.kHighsInf)
    lp.row_lower_ = np.concatenate([problem.b[: cones.zero], np.full(cones.nonneg, -highspy.kHighsInf)])
    lp.row_upper_ = problem.b
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = matrix.pointers.astype(np.int32), matrix.rows.astype(np.int32)
    lp.a_matrix_.value_ = matrix.values
    if problem.P.size:
        lower = as_scipy(problem.P_matrix).T.tocsc()
        lower.sort_indices()
        hessian = model.hessian_
        hessian.dim_, hessian.format_ = n, highspy.HessianFormat.kTriangular
        hessian.start_, hessian.index_, hessian.value_ = lower.indptr, lower.indices, lower.data
    return model
