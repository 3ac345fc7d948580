"""Which options SciPy's methods take: SciPy itself only warns of an unknown one, and goes on without it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

__all__ = [
    "FSOLVE_OPTIONS",
    "JACOBIAN_OPTIONS",
    "MINIMIZE_OPTIONS",
    "ROOT_OPTIONS",
    "check_differencing",
    "check_jacobian_options",
    "check_names",
]

FSOLVE_OPTIONS: Final = ("xtol", "maxfev", "band", "epsfcn", "factor", "diag")
"""Options of ``scipy.optimize.fsolve``, in SciPy's names; ``col_deriv`` is not among them, as the layout of
the Jacobian is invlayer's affair."""

_NONLIN = (
    *("nit", "disp", "maxiter", "ftol", "fatol", "xtol", "xatol", "tol_norm", "line_search"),
    "jac_options",
)

ROOT_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "hybr": ("xtol", "maxfev", "band", "eps", "factor", "diag"),
        "lm": ("xtol", "ftol", "gtol", "maxiter", "eps", "factor", "diag"),
        "broyden1": _NONLIN,
        "broyden2": _NONLIN,
        "anderson": _NONLIN,
        "linearmixing": _NONLIN,
        "diagbroyden": _NONLIN,
        "excitingmixing": _NONLIN,
        "krylov": _NONLIN,
        "df-sane": (
            *("ftol", "fatol", "fnorm", "maxfev", "disp", "M", "eta_strategy"),
            *("sigma_eps", "sigma_0", "line_search"),
        ),
    }
)
"""Options of each method of ``scipy.optimize.root``, as in its ``show_options``."""

JACOBIAN_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "broyden1": ("alpha", "reduction_method", "max_rank"),
        "broyden2": ("alpha", "reduction_method", "max_rank"),
        "anderson": ("alpha", "M", "w0"),
        "linearmixing": ("alpha",),
        "diagbroyden": ("alpha",),
        "excitingmixing": ("alpha", "alphamax"),
        "krylov": ("rdiff", "method", "outer_k", "inner_*"),
    }
)
"""What ``jac_options`` may hold; ``inner_*`` are the options of krylov's own linear solver."""

_DIFFERENCES = ("eps", "finite_diff_rel_step", "workers")
_TRUST_REGION = (
    *("initial_trust_radius", "max_trust_radius", "eta", "gtol", "maxiter", "disp", "workers"),
    "subproblem_maxiter",
)
_LINE_SEARCH = ("gtol", "norm", "maxiter", "disp", "c1", "c2", *_DIFFERENCES)

MINIMIZE_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "nelder-mead": ("maxiter", "maxfev", "disp", "initial_simplex", "xatol", "fatol", "adaptive"),
        "powell": ("xtol", "ftol", "maxiter", "maxfev", "disp", "direc"),
        "cg": _LINE_SEARCH,
        "bfgs": (*_LINE_SEARCH, "xrtol", "hess_inv0"),
        "newton-cg": ("xtol", "eps", "maxiter", "disp", "c1", "c2", "workers"),
        "l-bfgs-b": ("disp", "maxcor", "ftol", "gtol", "maxfun", "maxiter", "maxls", *_DIFFERENCES),
        "tnc": (
            *("scale", "offset", "maxCGit", "eta", "stepmx", "accuracy", "minfev", "ftol", "xtol", "gtol"),
            *("rescale", "disp", "maxfun", *_DIFFERENCES),
        ),
        "cobyla": ("rhobeg", "tol", "maxiter", "disp", "catol", "f_target"),
        "cobyqa": (
            *("disp", "maxfev", "maxiter", "f_target", "feasibility_tol", "initial_tr_radius"),
            *("final_tr_radius", "scale"),
        ),
        "slsqp": ("maxiter", "ftol", "disp", *_DIFFERENCES),
        "trust-constr": (
            *("xtol", "gtol", "barrier_tol", "sparse_jacobian", "maxiter", "verbose", "disp"),
            *("initial_constr_penalty", "initial_tr_radius", "initial_barrier_parameter"),
            *("initial_barrier_tolerance", "factorization_method", "finite_diff_rel_step", "workers"),
        ),
        "dogleg": _TRUST_REGION,
        "trust-ncg": _TRUST_REGION,
        "trust-krylov": (*_TRUST_REGION, "inexact"),
        "trust-exact": _TRUST_REGION,
    }
)
"""Options of each method of ``scipy.optimize.minimize``, as in its ``show_options``."""

_DIFFERENCING: Final = ("band", "eps", "epsfcn")


def check_names(given: Iterable[str], accepted: Collection[str], call: str) -> None:
    """Refuse option names that are not accepted.

    Raises
    ------
    TypeError
        Naming those that are unknown, and those that are accepted.
    """
    if all(name in accepted for name in given):
        return
    families = tuple(name[:-1] for name in accepted if name.endswith("*"))
    unknown = sorted(name for name in map(str, given) if not (name in accepted or name.startswith(families)))
    if unknown:
        raise TypeError(f"{call}: unknown options {unknown}; accepted are {sorted(accepted)}.")


def check_jacobian_options(given: Mapping[str, Any], method: str) -> None:
    """Refuse what the Jacobian approximation of ``method`` does not know.

    Raises
    ------
    TypeError
        As :func:`check_names`.
    """
    check_names(given, JACOBIAN_OPTIONS[method], f"scipy.root, method={method!r}, jac_options")


def check_differencing(given: Mapping[str, Any], switch: str, call: str) -> None:
    """Refuse options of the difference Jacobian next to the analytic one, where SciPy ignores them.

    Parameters
    ----------
    given : mapping
        The user's options.
    switch, call : str
        What switches the analytic Jacobian off, and who is asked: for the message.

    Raises
    ------
    ValueError
        Naming the options without effect.
    """
    idle = sorted(name for name in _DIFFERENCING if given.get(name) is not None)
    if idle:
        raise ValueError(
            f"{call}: {idle} concern a Jacobian by differences, but the analytic one is used; "
            f"leave them out, or add {switch}."
        )
