"""The registered solver ``casadi.rootfinder``: any conditions, called back from CasADi, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import casadi as ca
import numpy as np

from invlayer_casadi.callback import FunctionCallback, Interruption
from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_core import SampleProblem, Solver, SolverResult

__all__ = ["PLUGINS", "Rootfinder", "iterations_of"]

PLUGINS: Final = ("newton", "fast_newton", "kinsol", "nlpsol")
"""The root finders in CasADi that take systems of any size."""

_COMMON: Final = (
    *("linear_solver", "linear_solver_options", "constraints", "monitor", "verbose", "print_time"),
    *("show_eval_warnings", "common_options", "specific_options"),
)
_MAX_ITER: Final = 100  # CasADi's 1000 steps of a callback, where there is no root, are a second
_QUIET_NLPSOL: Final = {
    "print_time": False,
    "ipopt.print_level": 0,
    "ipopt.sb": "yes",
    "ipopt.hessian_approximation": "limited-memory",  # conditions called back have no second derivative
}


@final
@dataclass(frozen=True)
class Rootfinder(Solver):
    """``casadi.rootfinder`` on conditions in torch.

    Options are ``plugin`` (default ``"newton"``) and CasADi's own for it, in one flat dict; ``max_iter`` of
    newton and fast_newton is 100 by default. For ``"plugin": "nlpsol"`` they are ``nlpsol`` (default
    ``"ipopt"``) and ``nlpsol_options``.
    """

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        return True

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y with F(y) = 0; success and message are CasADi's.

        Raises
        ------
        TypeError
            If the plugin does not know an option.
        ValueError
            If the plugin is unknown.
        """
        plugin, settings = _read(options)
        interruption, n = Interruption(), problem.size
        with BUILDING:
            conditions = FunctionCallback(
                "conditions", n, n, problem.residual, problem.jacobian, interruption
            )
            function = ca.rootfinder("solve", plugin, conditions, settings)
        try:
            y = np.array(function(y0)).reshape(-1)
        finally:
            interruption.raise_it()
        stats = function.stats()
        return SolverResult(
            y=y,
            success=bool(stats.get("success", True)),
            iterations=iterations_of(stats, interruption.calls),
            message=str(stats.get("return_status", plugin)),
            aux={"evaluations": interruption.calls},
        )


def _read(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    settings = dict(options)
    plugin = settings.pop("plugin", "newton")
    if plugin not in PLUGINS:
        raise ValueError(f"casadi.rootfinder: unknown plugin {plugin!r}; accepted are {list(PLUGINS)}.")
    accepted = {*ca.rootfinder_options(plugin), *_COMMON}
    unknown = sorted(set(settings) - accepted)
    if unknown:
        raise TypeError(
            f"casadi.rootfinder, plugin={plugin!r}: unknown options {unknown}; accepted are "
            f"{sorted(accepted)}."
        )
    defaults: dict[str, Any] = {"error_on_fail": False, "show_eval_warnings": False}
    if plugin in ("newton", "fast_newton"):
        defaults["max_iter"] = _MAX_ITER
    if plugin == "nlpsol":
        settings.setdefault("nlpsol", "ipopt")
        if settings["nlpsol"] == "ipopt":
            settings["nlpsol_options"] = {**_QUIET_NLPSOL, **settings.get("nlpsol_options", {})}
    return plugin, defaults | settings


def iterations_of(stats: Mapping[str, Any], evaluations: int = -1) -> int:
    """Iterations as CasADi's statistics have them, or the number of evaluations of F."""
    for name in ("iter_count", "iter"):
        if name in stats:
            return int(stats[name])
    return evaluations
