"""Adapters for ``scipy.optimize.fsolve`` and ``scipy.optimize.root``.

NumPy's floating-point warnings are off within a solve: an overflow on the way is the method's affair, and the
residual of what it returns is measured by invlayer. ``numpy.errstate`` is used for that, and not
``warnings.catch_warnings``, which changes the filters of all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from scipy import optimize

from invlayer_core import SampleProblem, Solver, SolverResult
from invlayer_scipy.options import (
    FSOLVE_OPTIONS,
    ROOT_OPTIONS,
    check_differencing,
    check_jacobian_options,
    check_names,
)

__all__ = ["Fsolve", "Root"]

_TAKE_JACOBIAN: Final = ("hybr", "lm")


@final
@dataclass(frozen=True)
class Fsolve(Solver):
    """``scipy.optimize.fsolve``: Powell's hybrid method from MINPACK (hybrj, or hybrd without a Jacobian).

    Options are SciPy's: ``xtol``, ``maxfev``, ``band``, ``epsfcn``, ``factor``, ``diag``. The Jacobian is the
    analytic one; ``"fprime": None`` lets MINPACK take differences instead.
    """

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        return "fprime" not in options

    def renews_jacobian(self, options: Mapping[str, Any]) -> bool:
        return False  # Broyden's updates, as long as they make progress

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y with F(y) = 0; success and message are SciPy's, iterations its evaluations of F.

        Raises
        ------
        TypeError
            If an option is unknown, or ``fprime`` is anything but None.
        ValueError
            If ``band`` or ``epsfcn`` is given while the analytic Jacobian is used.
        """
        settings = dict(options)
        fprime = _fprime(problem, settings)
        with np.errstate(all="ignore"):
            y, info, status, message = optimize.fsolve(
                problem.residual, y0, fprime=fprime, full_output=True, **settings
            )
        evaluations = {name: int(info[name]) for name in ("nfev", "njev") if name in info}
        return SolverResult(
            y=y,
            success=bool(status == 1),
            iterations=evaluations["nfev"],
            message=message,
            aux={"status": int(status), **evaluations},
        )


def _fprime(problem: SampleProblem, settings: dict[str, Any]) -> Callable[[Any], Any] | None:
    """Take ``fprime`` out of the settings, check the others, and return the Jacobian to use."""
    check_names(settings, ("fprime", *FSOLVE_OPTIONS), "scipy.fsolve")
    analytic = "fprime" not in settings
    if (given := settings.pop("fprime", None)) is not None:
        raise TypeError(
            f"scipy.fsolve: fprime={given!r}; accepted is None, for differences. Without the option, the "
            "Jacobian is the analytic one."
        )
    if analytic:
        check_differencing(settings, "'fprime': None", "scipy.fsolve")
    return problem.jacobian if analytic else None


@final
@dataclass(frozen=True)
class Root(Solver):
    """``scipy.optimize.root``: all ten of its methods.

    Options are ``method`` (default ``"hybr"``), ``tol``, ``jac``, and those of the method in SciPy's names,
    all in one dict. The methods hybr and lm get the analytic Jacobian unless ``"jac": False``; the others
    approximate it as they go.
    """

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        method = str(options.get("method", "hybr")).lower()
        return method in _TAKE_JACOBIAN and options.get("jac") is not False

    def renews_jacobian(self, options: Mapping[str, Any]) -> bool:
        return str(options.get("method", "hybr")).lower() == "lm"

    def is_stackable(self, options: Mapping[str, Any]) -> bool:
        return str(options.get("method", "hybr")).lower() == "krylov" and options.get("tol_norm") is None

    def solve(self, problem: SampleProblem, y0: np.ndarray, options: Mapping[str, Any]) -> SolverResult:
        """Find y with F(y) = 0; success, message and iterations are SciPy's.

        Raises
        ------
        TypeError
            If the method does not know an option.
        ValueError
            If the method is unknown, or an option would have no effect.
        """
        settings = dict(options)
        method = _method(settings)
        tol = settings.pop("tol", None)
        jacobian = _jacobian(problem, method, settings)
        with np.errstate(all="ignore"):
            found = optimize.root(
                problem.residual, y0, method=method, jac=jacobian, tol=tol, options=settings
            )
        counts = {name: int(found[name]) for name in ("nit", "nfev", "njev") if name in found}
        return SolverResult(
            y=found.x,
            success=bool(found.success),
            iterations=counts.get("nit", counts.get("nfev", -1)),
            message=str(found.message),
            aux=counts,
        )


def _method(settings: dict[str, Any]) -> str:
    """Take the method out of the settings, and check that it knows the others."""
    given = settings.pop("method", "hybr")
    method = str(given).lower()  # as SciPy does
    if method not in ROOT_OPTIONS:
        raise ValueError(f"scipy.root: unknown method {given!r}; accepted are {list(ROOT_OPTIONS)}.")
    check_names(settings, ("tol", "jac", *ROOT_OPTIONS[method]), f"scipy.root, method={method!r}")
    if settings.get("jac_options"):
        check_jacobian_options(settings["jac_options"], method)
    return method


def _jacobian(problem: SampleProblem, method: str, settings: dict[str, Any]) -> Callable[[Any], Any] | None:
    """Take ``jac`` out of the settings, and return the Jacobian to use."""
    given = settings.pop("jac", method in _TAKE_JACOBIAN)
    call = f"scipy.root, method={method!r}"
    if not isinstance(given, bool):
        raise TypeError(f"{call}: jac={given!r}; accepted are True (analytic) and False (differences).")
    if not given:
        return None
    if method not in _TAKE_JACOBIAN:
        raise ValueError(f"{call}: takes no Jacobian; leave jac out, or use one of {list(_TAKE_JACOBIAN)}.")
    check_differencing(settings, "'jac': False", call)
    return problem.jacobian
