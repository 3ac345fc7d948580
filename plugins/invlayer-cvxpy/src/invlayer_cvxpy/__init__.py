"""CVXPY problems as differentiable layers, and the solvers behind CVXPY for invlayer's cone programs.

This is the registration module. It imports neither CVXPY nor a solver: that waits until one is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invlayer_core import SolverSpec, hookimpl

if TYPE_CHECKING:
    from invlayer_cvxpy.layer import CvxpyLayer
    from invlayer_cvxpy.problems import PiecewiseConstantWarning

__all__ = ["CvxpyLayer", "PiecewiseConstantWarning", "register_solver"]

_HOMES = {"CvxpyLayer": "invlayer_cvxpy.layer", "PiecewiseConstantWarning": "invlayer_cvxpy.problems"}

_THROUGH_CVXPY = {"ecos": "ecos", "mosek": "mosek", "gurobi": "gurobipy", "piqp": "piqp", "qoco": "qoco"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    return [
        _spec("clarabel", "solvers.clarabel:Clarabel", "clarabel>=0.9"),
        _spec("scs", "solvers.scs:SCS", "scs>=3.2"),
        _spec("osqp", "solvers.osqp:OSQP", "osqp>=1.0"),
        _spec("highs", "solvers.highs:HiGHS", "highspy>=1.7"),
        *(
            _spec(name, f"solvers.through_cvxpy:{name.title()}", package)
            for name, package in _THROUGH_CVXPY.items()
        ),
    ]


def _spec(name: str, adapter: str, package: str) -> SolverSpec:
    return SolverSpec(
        name=f"cvxpy.{name}",
        factory=f"invlayer_cvxpy.{adapter}",
        kinds=("cone",),
        requires=("cvxpy>=1.9", package),
        install=f"pip install invlayer-cvxpy '{package}'",
        thread_safe=name not in _THROUGH_CVXPY,
        constraints=True,
    )
