"""Any other solver that CVXPY knows: the canonical program is posed to CVXPY again.

That costs several times what the solver itself does, and needs no code per solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import cvxpy as cp
import numpy as np
from cvxpy.reductions.solvers import defines

import invlayer_core as inv
from invlayer_cvxpy.solvers.matrices import as_scipy, refuse_cones

__all__ = ["Ecos", "Gurobi", "Installed", "Mosek", "Piqp", "Qoco", "ThroughCvxpy"]


_KINDS: Final = {"soc": cp.SOC, "psd": cp.PSD, "exp": cp.ExpCone, "power": cp.PowCone3D}


class ThroughCvxpy(inv.Solver):
    """``cvxpy.Problem.solve(solver=...)``; options are those that CVXPY takes for that solver.

    Attributes
    ----------
    solver : str
        CVXPY's name of it.
    """

    solver: str

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        refuse_cones(f"CVXPY with {self.solver}", problem.structure.cones, _able(self.solver))
        x = cp.Variable(problem.structure.size)
        slack = problem.b - as_scipy(problem.A_matrix) @ x
        constraints, entries = _constraints(slack, problem.structure.cones)
        objective = problem.q @ x
        if problem.P.size:
            upper = as_scipy(problem.P_matrix)
            whole = upper + upper.T
            whole.setdiag(upper.diagonal())
            objective = objective + 0.5 * cp.quad_form(x, cp.psd_wrap(whole))
        posed = cp.Problem(cp.Minimize(objective), constraints)
        posed.solve(solver=self.solver, **options)
        y = np.full(problem.structure.equations, np.nan)
        for constraint, places in zip(constraints, entries, strict=True):
            y[places] = _dual(constraint)
        value = np.full(problem.structure.size, np.nan) if x.value is None else x.value
        return inv.SolverResult(
            y=problem.joined(value, y, problem.b - as_scipy(problem.A_matrix) @ value),
            success=posed.status == cp.OPTIMAL,
            no_solution=posed.status in (cp.INFEASIBLE, cp.UNBOUNDED),
            iterations=posed.solver_stats.num_iters or -1 if posed.solver_stats else -1,
            message=f"{self.solver}: {posed.status}",
            aux={"status": posed.status, "objective": posed.value},
        )


class Ecos(ThroughCvxpy):
    """ECOS (Domahidi, Chu & Boyd 2013)."""

    solver = "ECOS"


class Mosek(ThroughCvxpy):
    """MOSEK."""

    solver = "MOSEK"


class Gurobi(ThroughCvxpy):
    """Gurobi."""

    solver = "GUROBI"


class Piqp(ThroughCvxpy):
    """PIQP (Schwan et al. 2023)."""

    solver = "PIQP"


class Qoco(ThroughCvxpy):
    """QOCO (Chari & Açıkmeşe 2025)."""

    solver = "QOCO"


@final
@dataclass(frozen=True)
class Installed(ThroughCvxpy):
    """Any solver of ``cvxpy.installed_solvers()``, by CVXPY's name."""

    solver: str


def _able(solver: str) -> dict[str, bool]:
    """Which curved cones CVXPY hands over to that solver."""
    known = [defines.SOLVER_MAP_CONIC.get(solver), defines.SOLVER_MAP_QP.get(solver)]
    accepted = {kind for each in known if each is not None for kind in each.SUPPORTED_CONSTRAINTS}
    return {name: not any(known) or kind in accepted for name, kind in _KINDS.items()}


def _constraints(slack: Any, cones: inv.Cones) -> tuple[list[Any], list[slice]]:
    """slack ∈ K as CVXPY constraints, and the entries of each."""
    constraints: list[Any] = []
    entries: list[slice] = []
    start = 0

    def add(size: int, make: Any) -> None:
        nonlocal start
        if size:
            constraints.append(make(slack[start : start + size]))
            entries.append(slice(start, start + size))
            start += size

    add(cones.zero, lambda part: part == 0)
    add(cones.nonneg, lambda part: part >= 0)
    for size in cones.soc:
        add(size, lambda part: cp.SOC(part[0], part[1:]))
    for side in cones.psd:
        add(side * (side + 1) // 2, lambda part, side=side: _matrix(part, side) >> 0)
    for _ in range(cones.exp):
        add(3, lambda part: cp.ExpCone(part[0], part[1], part[2]))
    for alpha in cones.power:
        add(3, lambda part, alpha=alpha: cp.PowCone3D(part[0], part[1], part[2], alpha))
    return constraints, entries


def _matrix(part: Any, side: int) -> Any:
    cols, rows = np.tril_indices(side)
    place = np.zeros((side, side), dtype=int)
    place[rows, cols] = place[cols, rows] = np.arange(len(rows))
    scale = np.where(np.eye(side) > 0, 1.0, 2.0**-0.5)
    return cp.multiply(scale, cp.reshape(part[place.reshape(-1)], (side, side), order="C"))


def _dual(constraint: Any) -> np.ndarray:
    """The dual value in the layout of the slack."""
    values = [dual.value for dual in constraint.dual_variables]
    if any(value is None for value in values):
        return np.array(np.nan)
    if isinstance(constraint, cp.constraints.Equality | cp.constraints.Zero):
        return -np.asarray(values[0])  # CVXPY multiplies the slack, we its negative
    if isinstance(constraint, cp.constraints.PSD):
        cols, rows = np.tril_indices(constraint.args[0].shape[0])
        return np.asarray(values[0])[rows, cols] * np.where(rows == cols, 1.0, 2.0**0.5)
    return np.concatenate([np.atleast_1d(np.asarray(value).reshape(-1)) for value in values])
