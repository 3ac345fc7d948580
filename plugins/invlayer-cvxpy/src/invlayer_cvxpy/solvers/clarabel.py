"""Clarabel, an interior-point solver for all cones that CVXPY knows (Goulart & Chen 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import clarabel
import numpy as np

import invlayer_core as inv
from invlayer_cvxpy.solvers.matrices import as_scipy, refuse_options

__all__ = ["Clarabel"]


@final
class Clarabel(inv.Solver):
    """``clarabel.DefaultSolver``; options are the attributes of ``clarabel.DefaultSettings``."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        solver = clarabel.DefaultSolver(
            as_scipy(problem.P_matrix),
            problem.q,
            as_scipy(problem.A_matrix),
            problem.b,
            _cones(problem.structure.cones),
            _settings(options),
        )
        found = solver.solve()
        status = str(found.status)
        return inv.SolverResult(
            y=problem.joined(np.array(found.x), np.array(found.z), np.array(found.s)),
            success=status in ("Solved", "AlmostSolved"),
            iterations=found.iterations,
            message=f"Clarabel: {status}",
            aux={"status": status, "objective": found.obj_val},
        )


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
