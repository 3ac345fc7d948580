"""Clarabel, an interior-point solver for all cones that CVXPY knows (Goulart & Chen 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import clarabel
import numpy as np

import invlayer_core as inv
from invlayer_cvxpy.solvers.matrices import as_scipy, refuse_options

__all__ = ["Clarabel"]


_GAVE_UP: Final = ("InsufficientProgress", "NumericalError")


@final
class Clarabel(inv.Solver):
    """``clarabel.DefaultSolver``; options are the attributes of ``clarabel.DefaultSettings``.

    Default tolerances are 1e-13 for linear and quadratic programs, and 1e-10 with curved cones, not 1e-8:
    where s and y are both small, each is known to √gap only. An interior-point method gains a digit per
    iteration there; with curved cones the last digits are dear, and left to polishing. Where Clarabel cannot
    reach them, it solves once more with tolerances of its own, and the message says so.
    """

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        gap = 1e-13 if problem.structure.cones.is_polyhedral else 1e-10
        tight = {"tol_gap_abs": gap, "tol_gap_rel": gap, "tol_feas": max(gap, 1e-12)}
        found, remark = _solve(problem, {**tight, **options}), ""
        if str(found.status) in _GAVE_UP:
            found, remark = _solve(problem, options), f" (without {gap:.0e}: {found.status} there)"
        status = str(found.status)
        return inv.SolverResult(
            y=problem.joined(np.array(found.x), np.array(found.z), np.array(found.s)),
            success=status in ("Solved", "AlmostSolved"),
            no_solution=status.endswith("Infeasible"),
            iterations=found.iterations,
            message=f"Clarabel: {status}{remark}",
            aux={"status": status, "objective": found.obj_val},
        )


def _solve(problem: inv.ConeProblem, options: Mapping[str, Any]) -> Any:
    return clarabel.DefaultSolver(
        as_scipy(problem.P_matrix), problem.q, as_scipy(problem.A_matrix), problem.b,
        _cones(problem.structure.cones), _settings(options),
    ).solve()  # fmt: skip


def _settings(options: Mapping[str, Any]) -> Any:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    known = [name for name in dir(settings) if not name.startswith("_") and name != "default"]
    refuse_options("cvxpy.clarabel", set(options) - set(known), known)
    for name, value in options.items():
        setattr(settings, name, value)
    return settings


def _cones(cones: inv.Cones) -> list[Any]:
    return [
        *([clarabel.ZeroConeT(cones.zero)] if cones.zero else []),
        *([clarabel.NonnegativeConeT(cones.nonneg)] if cones.nonneg else []),
        *(clarabel.SecondOrderConeT(size) for size in cones.soc),
        *(clarabel.PSDTriangleConeT(side) for side in cones.psd),
        *(clarabel.ExponentialConeT() for _ in range(cones.exp)),
        *(clarabel.PowerConeT(alpha) for alpha in cones.power),
    ]
