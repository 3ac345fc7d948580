"""The Functions that solve a program: made by casadi.nlpsol and casadi.qpsol, silent by default."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import casadi as ca

from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_core import ConditionsError

__all__ = ["QUIET", "make_nlpsol", "make_qpsol"]

_NO_TIME: Final = {"print_time": False}
QUIET: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ipopt": {"ipopt.print_level": 0, "ipopt.sb": "yes"},
        "sqpmethod": {
            "print_header": False,
            "print_iteration": False,
            "print_status": False,
            "qpsol": "qrqp",
            "qpsol_options": {"print_iter": False, "print_header": False, "print_info": False},
        },
        "qrsqp": {
            "print_header": False,
            "print_iteration": False,
            "qpsol": "qrqp",
            "qpsol_options": {"print_iter": False, "print_header": False, "print_info": False},
        },
        "qrqp": {"print_iter": False, "print_header": False, "print_info": False},
        "qpoases": {"printLevel": "none"},
        "osqp": {"osqp.verbose": False},
        "fatrop": {"fatrop.print_level": 0},
        "scpgen": {"print_header": False, "qpsol": "qrqp"},
        "feasiblesqpmethod": {"print_header": False, "print_iteration": False, "print_status": False},
    }
)
"""What keeps each plugin silent."""


def make_nlpsol(oracle: ca.Function, solver: str, options: Mapping[str, Any] | None) -> ca.Function:
    """``casadi.nlpsol`` of ``(x, p) -> (f, g)``.

    Raises
    ------
    ConditionsError
        In CasADi's words, if it does not know the plugin or an option.
    """
    return _make(ca.nlpsol, oracle, solver, options)


def make_qpsol(oracle: ca.Function, solver: str, options: Mapping[str, Any] | None) -> ca.Function:
    """``casadi.qpsol`` of the same; errors as :func:`make_nlpsol`."""
    return _make(ca.qpsol, oracle, solver, options)


def _make(maker: Any, oracle: ca.Function, solver: str, options: Mapping[str, Any] | None) -> ca.Function:
    settings = {**_NO_TIME, **QUIET.get(solver, {}), "error_on_fail": False, **dict(options or {})}
    kind: Any = ca.SX if oracle.is_a("SXFunction") else ca.MX
    x, p = (kind.sym(name, oracle.sparsity_in(i)) for i, name in enumerate("xp"))
    with BUILDING:
        f, g = oracle(x, p)
        problem = {"x": x, "p": p, "f": f, "g": g}
        try:
            function: ca.Function = maker("solve", solver, problem, settings)
        except RuntimeError as error:
            raise ConditionsError(
                f"casadi.{maker.__name__}(solver={solver!r}) refuses the problem or its options: {error}"
            ) from error
    return function
