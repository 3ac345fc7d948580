"""The QP solvers behind qpsolvers, for invlayer.

This is the registration module. It imports neither qpsolvers nor any solver: that waits until one is used.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from invlayer_core import SolverSpec, hookimpl

__all__ = ["register_solver"]

DISTRIBUTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "clarabel": "clarabel",
        "cvxopt": "cvxopt",
        "daqp": "daqp",
        "ecos": "ecos",
        "gurobi": "gurobipy",
        "highs": "highspy",
        "mosek": "mosek",
        "osqp": "osqp",
        "piqp": "piqp",
        "proxqp": "proxsuite",
        "qpalm": "qpalm",
        "qpax": "qpax",
        "qpoases": "qpoases",
        "qpswift": "qpSWIFT",
        "quadprog": "quadprog",
        "scs": "scs",
    }
)
"""The solvers, and what brings each of them."""


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    return [
        SolverSpec(
            name=f"qpsolvers.{name}",
            factory=f"invlayer_qpsolvers.solvers:{name.capitalize()}",
            kinds=("qp",),
            requires=("qpsolvers>=4.4", distribution),
            install=f"pip install invlayer-qpsolvers {distribution}",
            # Every solve makes a solver of its own.
            thread_safe=True,
            bounds=True,
            constraints=True,
        )
        for name, distribution in DISTRIBUTIONS.items()
    ]
