"""OSQP, an operator-splitting solver for quadratic programs (Stellato et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
import osqp

import invlayer_core as inv
from invlayer_cvxpy.solvers.matrices import as_scipy, refuse_cones, refuse_options

__all__ = ["OSQP"]

_DEFAULTS: Final = {
    "eps_abs": 1e-9,
    "eps_rel": 1e-9,
    "max_iter": 100_000,
    "polishing": True,
    "verbose": False,
}
_CONES: Final = {"soc": False, "psd": False, "exp": False, "power": False}


@final
class OSQP(inv.Solver):
    """``osqp.OSQP``; options are its own.

    Defaults that differ from OSQP's: tolerances of 1e-9 instead of 1e-3, which invlayer's certificate would
    not accept, ``polishing``, and room for as many iterations as that takes.
    """

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        cones = problem.structure.cones
        refuse_cones("cvxpy.osqp", cones, _CONES)
        solver = osqp.OSQP()
        names = [name for name in dir(solver.ext.OSQPSettings()) if not name.startswith("_")]
        refuse_options("cvxpy.osqp", set(options) - set(names), names)
        lower = np.concatenate([problem.b[: cones.zero], np.full(cones.nonneg, -np.inf)])
        A = as_scipy(problem.A_matrix)
        solver.setup(as_scipy(problem.P_matrix), problem.q, A, lower, problem.b, **{**_DEFAULTS, **options})
        if problem.start is not None:
            solver.warm_start(x=problem.start[0], y=problem.start[1])
        found = solver.solve(raise_error=False)
        nothing = "infeasible" in found.info.status
        x, y = np.array(found.x, dtype=np.float64), np.array(found.y, dtype=np.float64)
        if nothing:  # what OSQP returns then is no point of the program
            x, y = np.full_like(x, np.nan), np.full_like(y, np.nan)
        return inv.SolverResult(
            y=problem.joined(x, y, problem.b - A @ x),
            no_solution=nothing,
            success=found.info.status in ("solved", "solved inaccurate"),
            iterations=found.info.iter,
            message=f"OSQP: {found.info.status}",
            aux={"status": found.info.status, "objective": found.info.obj_val},
        )
