"""Solve, certify and polish one program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np

from invlayer_core.quadratic.sides import CLEAR, EXACT, SIGN, WEAK
from invlayer_core.quadratic.single.cores import largest
from invlayer_core.quadratic.single.factors import Factors, factorise
from invlayer_core.quadratic.single.program import HostProgram
from invlayer_core.solvers.contract import Solver, SolverResult

__all__ = ["CertifiedPoint", "certified", "solved"]

_ROUNDS = 6  # active sets that are tried before the general way has its turn


@final
class CertifiedPoint(NamedTuple):
    """z with its active set, and the factors of its matrix if it was polished."""

    z: np.ndarray
    active: np.ndarray
    factors: Factors | None


def solved(program: HostProgram, solver: Solver, y0: np.ndarray, options: Mapping[str, Any]) -> Any:
    """z as the solver has it; None if it has none."""
    try:
        result = solver.solve(program.problem(), y0, dict(options))
    except Exception:  # the general way keeps it, and says whose it is
        return None
    return result.y if isinstance(result, SolverResult) and result.success else None


def certified(program: HostProgram, z: np.ndarray) -> CertifiedPoint | None:
    """z on an active set that it proves, polished where it is not exact; None if there is a doubt."""
    n, equalities = program.layout.size, program.layout.equalities
    if z.shape != (n + len(program.d),):
        return None
    slack, weight, error = program.measured(z)
    active = weight > slack
    active[:equalities] = True
    error = max(error, largest(np.where(active, slack, weight)))
    margin = np.maximum(slack, weight)[equalities:].min(initial=np.inf)
    if error <= EXACT and margin >= CLEAR:
        return CertifiedPoint(_snapped(program, z, active), active, None)
    return _polished(program, active) if error < np.inf else None  # False for NaN


def _polished(program: HostProgram, active: np.ndarray) -> CertifiedPoint | None:
    """The primal-dual active-set method, as in ``quadratic/search.py``, as long as nothing is unusual."""
    equalities = program.layout.equalities
    rhs = np.concatenate([-program.given["q"], program.d])
    for _ in range(_ROUNDS):
        factors = factorise(program, active)
        z = None if factors is None else factors.solve(rhs)
        if z is None:
            return None
        slack, weight, error = program.measured(z)
        wrong = np.where(active, weight, slack) < -SIGN
        wrong[:equalities] = False
        if wrong.any():
            active = active ^ wrong
            continue
        gap = largest(slack[active])
        margin = np.maximum(slack, weight)[equalities:].min(initial=np.inf)
        if not max(error, gap) <= 1e-8 or margin <= WEAK:
            return None
        return CertifiedPoint(_snapped(program, z, active), active, factors)
    return None


def _snapped(program: HostProgram, z: np.ndarray, active: np.ndarray) -> np.ndarray:
    n, equalities = program.layout.size, program.layout.equalities
    z = z + 0.0  # a copy, without -0
    z[n:][~active] = 0.0
    np.maximum(z[n + equalities :], 0.0, out=z[n + equalities :])
    return z
