"""SCS, an operator-splitting solver for all cones that CVXPY knows (O'Donoghue 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
import scs

import invlayer_core as inv
from invlayer_cvxpy.solvers.matrices import as_scipy, refuse_options

__all__ = ["SCS"]

_DEFAULTS: Final = {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 100_000, "verbose": False}
_NAMES: Final = (
    "use_indirect", "mkl", "apple_ldl", "gpu", "cudss", "linear_solver", "normalize", "max_iters", "scale",
    "adaptive_scale", "eps_abs", "eps_rel", "eps_infeas", "alpha", "rho_x", "acceleration_lookback",
    "acceleration_interval", "time_limit_secs", "verbose", "write_data_filename", "log_csv_filename", "eps",
    "acceleration_type_1", "acceleration_regularization", "acceleration_relaxation",
)  # fmt: skip


@final
class SCS(inv.Solver):
    """``scs.SCS``; options are its own, and ``eps`` for both tolerances.

    Two defaults differ from those of SCS: tolerances of 1e-8 instead of 1e-4, which invlayer's certificate
    would not accept, and room for as many iterations as that takes.
    """

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        refuse_options("cvxpy.scs", set(options) - set(_NAMES), _NAMES)
        settings = {**_DEFAULTS, **options}
        if (eps := settings.pop("eps", None)) is not None:
            settings.update(eps_abs=eps, eps_rel=eps)
        order = _row_order(problem.structure.cones)
        data = {
            "P": as_scipy(problem.P_matrix),
            "A": as_scipy(problem.A_matrix)[order].tocsc(),
            "b": problem.b[order],
            "c": problem.q,
        }
        solver = scs.SCS(data, _cones(problem.structure.cones), **settings)
        if problem.start is None:
            found = solver.solve()
        else:
            x, y, s = problem.start
            found = solver.solve(warm_start=True, x=x, y=y[order], s=s[order])
        back = np.argsort(order)
        info = found["info"]
        return inv.SolverResult(
            y=problem.joined(found["x"], found["y"][back], found["s"][back]),
            success=info["status_val"] in (1, 2),
            no_solution=info["status_val"] in (-1, -2, -6, -7),
            iterations=info["iter"],
            message=f"SCS: {info['status']}",
            aux={"status": info["status"], "objective": info["pobj"]},
        )


def _cones(cones: inv.Cones) -> dict[str, Any]:
    return {
        "z": cones.zero,
        "l": cones.nonneg,
        "q": list(cones.soc),
        "s": list(cones.psd),
        "ep": cones.exp,
        "p": list(cones.power),
    }


def _row_order(cones: inv.Cones) -> np.ndarray:
    """Where SCS's entries are in ours: it keeps the lower triangle of a symmetric matrix, we the upper."""
    start = cones.zero + cones.nonneg + sum(cones.soc)
    parts = [np.arange(start)]
    for side in cones.psd:
        cols, rows = np.triu_indices(side)  # the lower triangle, column by column
        parts.append(start + rows * (rows + 1) // 2 + cols)
        start += side * (side + 1) // 2
    parts.append(np.arange(start, cones.size))
    return np.concatenate(parts)
