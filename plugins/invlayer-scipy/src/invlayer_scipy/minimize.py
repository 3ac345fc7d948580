"""Adapters for ``scipy.optimize.minimize`` and ``minimize_scalar``.

SciPy's default tolerances are made for values: BFGS stops at a gradient of 1e-5, SLSQP at a change of the
objective by 1e-6. A derivative of the solution needs the solution itself, so the defaults here are tighter
(``TIGHT``); every one can be given as an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, final

import numpy as np
from scipy import optimize

from invlayer_core import SampleProblem, Solver, SolverResult
from invlayer_scipy.options import MINIMIZE_OPTIONS, check_names

__all__ = ["TIGHT", "Minimize", "MinimizeScalar"]

_TRUST = {"gtol": 1e-9}
TIGHT: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "nelder-mead": {"xatol": 1e-10, "fatol": 1e-14},
        "powell": {"xtol": 1e-10, "ftol": 1e-15},
        "cg": {"gtol": 1e-9},
        "bfgs": {"gtol": 1e-9},
        "newton-cg": {"xtol": 1e-12},
        "l-bfgs-b": {"gtol": 1e-9, "ftol": 0.0},
        "tnc": {"gtol": 1e-9, "ftol": 0.0, "xtol": 1e-14},
        "cobyla": {"tol": 1e-9},
        "cobyqa": {"final_tr_radius": 1e-9},
        "slsqp": {"ftol": 1e-14},
        "trust-constr": {"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-10},
        "dogleg": _TRUST,
        "trust-ncg": _TRUST,
        "trust-krylov": _TRUST,
        "trust-exact": _TRUST,
    }
)
"""Stopping tolerances of each method where the user gives none."""

_TAKE_GRADIENT: Final = (
    *("cg", "bfgs", "newton-cg", "l-bfgs-b", "tnc", "slsqp", "trust-constr"),
    *("dogleg", "trust-ncg", "trust-krylov", "trust-exact"),
)
_NEED_GRADIENT: Final = ("newton-cg", "dogleg", "trust-ncg", "trust-krylov", "trust-exact")
_TAKE_HESSIAN: Final = (*_NEED_GRADIENT, "trust-constr")
_TAKE_BOUNDS: Final = (
    *("nelder-mead", "powell", "l-bfgs-b", "tnc", "slsqp", "trust-constr"),
    *("cobyla", "cobyqa"),
)
_TAKE_CONSTRAINTS: Final = ("slsqp", "trust-constr", "cobyla", "cobyqa")


@final
class Minimize(Solver):
    """``scipy.optimize.minimize``: all its methods, with exact gradients and Hessians where they take them.

    Options are ``method`` (default as in SciPy: SLSQP with constraints, L-BFGS-B with bounds, BFGS
    else), ``tol``, ``jac`` (False: differences), and those of the method in SciPy's names, in one dict.
    """

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        return str(options.get("method", "")).lower() in _TAKE_HESSIAN

    def takes_turns(self, options: Mapping[str, Any]) -> bool:
        return str(options.get("method", "")).lower() != "cobyqa"  # SciPy runs one of them at a time

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Minimise the objective; success, message and iterations are SciPy's.

        Raises
        ------
        TypeError
            If the method does not know an option.
        ValueError
            If the method is unknown, or cannot take the bounds or constraints of the problem.
        """
        settings = dict(options)
        method = _method(settings, problem)
        tol = settings.pop("tol", None)
        with_gradient = _uses_gradient(settings, method)
        keywords: dict[str, Any] = {}
        if method in _TAKE_HESSIAN and with_gradient:
            keywords["hess"] = problem.hessian
        if problem.has("lower") or problem.has("upper"):
            keywords["bounds"] = _bounds(problem, y0)
        if problem.has("equalities") or problem.has("inequalities"):
            keywords["constraints"] = _constraints(problem, method)
        if tol is None:
            settings = {**TIGHT[method], **settings}
        with np.errstate(all="ignore"):
            found = optimize.minimize(
                problem.objective, y0, method=method, jac=problem.gradient if with_gradient else None,
                tol=tol, options=settings, **keywords,
            )  # fmt: skip
        counts = {name: int(found[name]) for name in ("nit", "nfev", "njev", "nhev") if name in found}
        return SolverResult(
            y=found.x,
            success=bool(found.success),
            iterations=counts.get("nit", counts.get("nfev", -1)),
            message=str(found.message),
            aux={"objective": float(found.fun), **counts},
        )


def _method(settings: dict[str, Any], problem: SampleProblem) -> str:
    """Take the method out of the settings; check that it knows the others, and can take the problem."""
    constrained = problem.has("equalities") or problem.has("inequalities")
    bounded = problem.has("lower") or problem.has("upper")
    given = settings.pop("method", None)
    default = "slsqp" if constrained else "l-bfgs-b" if bounded else "bfgs"
    method = default if given is None else str(given).lower()  # as SciPy does
    if method not in MINIMIZE_OPTIONS:
        raise ValueError(f"scipy.minimize: unknown method {given!r}; accepted are {list(MINIMIZE_OPTIONS)}.")
    check_names(settings, ("tol", "jac", *MINIMIZE_OPTIONS[method]), f"scipy.minimize, method={method!r}")
    if constrained and method not in _TAKE_CONSTRAINTS:
        raise ValueError(
            f"scipy.minimize, method={method!r}: takes no constraints; accepted with eq= or ineq= are "
            f"{list(_TAKE_CONSTRAINTS)}."
        )
    if bounded and method not in _TAKE_BOUNDS:
        raise ValueError(
            f"scipy.minimize, method={method!r}: takes no bounds; accepted with bounds= are "
            f"{list(_TAKE_BOUNDS)}."
        )
    return method


def _uses_gradient(settings: dict[str, Any], method: str) -> bool:
    """Take ``jac`` out of the settings."""
    given = settings.pop("jac", method in _TAKE_GRADIENT)
    if not isinstance(given, bool):
        raise TypeError(
            f"scipy.minimize, method={method!r}: jac={given!r}; accepted are True (analytic) and False "
            "(differences)."
        )
    if given and method not in _TAKE_GRADIENT:
        raise ValueError(
            f"scipy.minimize, method={method!r}: takes no gradient; leave jac out, or use one of "
            f"{list(_TAKE_GRADIENT)}."
        )
    if not given and method in _NEED_GRADIENT:
        raise ValueError(f"scipy.minimize, method={method!r}: needs the gradient; leave jac out.")
    return given


def _bounds(problem: SampleProblem, y0: np.ndarray) -> optimize.Bounds:
    lower = problem.lower(y0) if problem.has("lower") else -np.inf
    upper = problem.upper(y0) if problem.has("upper") else np.inf
    return optimize.Bounds(lower, upper)


def _constraints(problem: SampleProblem, method: str) -> list[Any]:
    """The constraints in the form of SciPy's that the method knows best."""
    functions = {
        "eq": ("equalities", problem.equalities, problem.equalities_jacobian),
        "ineq": ("inequalities", problem.inequalities, problem.inequalities_jacobian),
    }
    present = {sign: row for sign, row in functions.items() if problem.has(row[0])}
    if method == "slsqp":
        return [
            {"type": sign, "fun": value, "jac": jacobian} for sign, (_, value, jacobian) in present.items()
        ]
    derivative = method == "trust-constr"
    return [
        optimize.NonlinearConstraint(
            value,
            0.0,
            0.0 if sign == "eq" else np.inf,
            **({"jac": jacobian, "hess": "2-point"} if derivative else {}),
        )
        for sign, (_, value, jacobian) in present.items()
    ]


@final
class MinimizeScalar(Solver):
    """``scipy.optimize.minimize_scalar``: one unknown; methods ``"brent"``, ``"golden"``, ``"bounded"``.

    Options are ``method``, ``bracket`` (two or three points, or tensors of them per sample), ``bounds``,
    ``tol``, ``maxiter``, ``xtol``, ``xatol``. Without a bracket SciPy goes downhill from the guess and the
    guess + 1.
    """

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Minimise the objective of one unknown.

        Raises
        ------
        TypeError
            If an option is unknown, or the method does not take it.
        """
        settings = dict(options)
        keywords = {name: settings.pop(name, None) for name in ("bracket", "bounds", "method", "tol")}
        method = keywords["method"] = str(
            keywords["method"] or ("brent" if keywords["bounds"] is None else "bounded")
        ).lower()
        accepted = {"brent": ("xtol", "maxiter"), "golden": ("xtol", "maxiter")}
        check_names(
            settings, accepted.get(method, ("xatol", "maxiter")), f"scipy.minimize_scalar, {method!r}"
        )
        if keywords["bracket"] is None and method != "bounded":
            keywords["bracket"] = (float(y0[0]), float(y0[0]) + 1.0)
        with np.errstate(all="ignore"):
            found = optimize.minimize_scalar(
                lambda y: problem.objective(np.array([float(y)])), options=settings, **keywords
            )
        return SolverResult(
            y=np.array([float(found.x)]),
            success=bool(found.success),
            iterations=int(found.nit if "nit" in found else found.nfev),
            message=str(found.message),
            aux={"objective": float(found.fun), "nfev": int(found.nfev)},
        )
