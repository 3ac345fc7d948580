"""The registered solvers ``casadi.ipopt`` and ``casadi.sqpmethod``: objective and constraints in torch."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

import casadi as ca
import numpy as np

from invlayer_casadi.callback import FunctionCallback, Interruption
from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_casadi.nlp.solver_functions import QUIET
from invlayer_casadi.rootfinding.registered import iterations_of
from invlayer_core import SampleProblem, Solver, SolverResult

__all__ = ["Ipopt", "Sqpmethod"]

_ROUNDING = 100.0  # tolerances are at least so many rounding units of F
_COMMON: Final = ("verbose", "print_time", "show_eval_warnings", "common_options", "specific_options")


class _Nlpsol(Solver, ABC):
    """``casadi.nlpsol`` with functions that call back; second derivatives are approximated on the way."""

    plugin: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    tolerances: ClassVar[Mapping[str, float]]

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Minimise; success and message are CasADi's, and its multipliers are handed over.

        Raises
        ------
        TypeError
            If the plugin does not know an option.
        """
        settings = self._settings(options, problem.precision)
        interruption, n = Interruption(), problem.size
        rows = _sizes(problem, y0)  # asked for before the lock: in lockstep, another sample may come first
        with BUILDING:
            x = ca.MX.sym("x", n)
            objective = FunctionCallback("objective", n, 1, problem.objective, problem.gradient, interruption)
            kept, g = _constraints(problem, rows, interruption, x)
            function = ca.nlpsol("solve", self.plugin, {"x": x, "f": objective(x), "g": g}, settings)
        lower = problem.lower(y0) if problem.has("lower") else np.full(n, -np.inf)
        upper = problem.upper(y0) if problem.has("upper") else np.full(n, np.inf)
        upper_rows = np.concatenate([np.zeros(rows[0]), np.full(rows[1], np.inf)])
        try:
            found = function(x0=y0, lbx=lower, ubx=upper, lbg=np.zeros(sum(rows)), ubg=upper_rows)
        finally:
            del kept  # CasADi does not own the Python side of a callback
            interruption.raise_it()
        stats = function.stats()
        return SolverResult(
            y=np.array(found["x"]).reshape(-1),
            success=bool(stats.get("success", True)),
            iterations=iterations_of(stats, interruption.calls),
            message=str(stats.get("return_status", "")),
            aux={"objective": float(found["f"]), "multipliers": _multipliers(found, rows[0], lower == upper)},
        )

    def _settings(self, options: Mapping[str, Any], precision: float) -> dict[str, Any]:
        known = set(ca.nlpsol_options(self.plugin)) | set(_COMMON)
        unknown = sorted(
            name for name in options if name not in known and not name.startswith(f"{self.plugin}.")
        )
        if unknown:
            raise TypeError(
                f"casadi.{self.plugin}: unknown options {unknown}; accepted are {sorted(known)}, and for "
                f"{self.plugin} itself '{self.plugin}.<name>'."
            )
        quiet = {"print_time": False, "error_on_fail": False, "show_eval_warnings": False}
        # No stricter than what F can tell: in float32 a tolerance of 1e-9 is never reached.
        tolerances = {name: max(least, _ROUNDING * precision) for name, least in self.tolerances.items()}
        return {**quiet, **QUIET[self.plugin], **self.defaults, **tolerances, **options}


def _sizes(problem: SampleProblem, y0: np.ndarray) -> tuple[int, int]:
    """How many equations and inequalities there are."""
    equations = len(problem.equalities(y0)) if problem.has("equalities") else 0
    inequalities = len(problem.inequalities(y0)) if problem.has("inequalities") else 0
    return equations, inequalities


def _constraints(
    problem: SampleProblem, sizes: tuple[int, int], interruption: Interruption, x: ca.MX
) -> tuple[list[FunctionCallback], Any]:
    """The callbacks of equations and inequalities, and both as one expression."""
    callbacks = []
    for name, size in zip(("equalities", "inequalities"), sizes, strict=True):
        if problem.has(name):
            function, jacobian = getattr(problem, name), getattr(problem, f"{name}_jacobian")
            callbacks.append(FunctionCallback(name, problem.size, size, function, jacobian, interruption))
    expression = ca.vertcat(*(callback(x) for callback in callbacks)) if callbacks else ca.MX(0, 1)
    return callbacks, expression


def _multipliers(found: Mapping[str, Any], equations: int, fixed: np.ndarray) -> dict[str, np.ndarray]:
    """CasADi's, whose Lagrangian adds what ours subtracts."""
    lam_g, lam_x = (np.array(found[name]).reshape(-1) for name in ("lam_g", "lam_x"))
    return {
        "equalities": -lam_g[:equations],
        "inequalities": -lam_g[equations:],
        "lower": np.where(fixed, -lam_x, np.maximum(-lam_x, 0.0)),
        "upper": np.where(fixed, 0.0, np.maximum(lam_x, 0.0)),
    }


@final
class Ipopt(_Nlpsol):
    """``casadi.nlpsol`` with ipopt (Wächter & Biegler 2006), its Hessian by limited-memory BFGS.

    Options are CasADi's, and ipopt's own as ``"ipopt.<name>"``.
    """

    plugin = "ipopt"
    defaults: ClassVar = {"ipopt.hessian_approximation": "limited-memory"}
    tolerances: ClassVar = {"ipopt.tol": 1e-9, "ipopt.acceptable_tol": 1e-7}


@final
class Sqpmethod(_Nlpsol):
    """``casadi.nlpsol`` with sqpmethod: sequential quadratic programs by qrqp, their Hessian by BFGS.

    Options are CasADi's.
    """

    plugin = "sqpmethod"
    defaults: ClassVar = {"hessian_approximation": "limited-memory"}
    tolerances: ClassVar = {"tol_du": 1e-9, "tol_pr": 1e-9}
