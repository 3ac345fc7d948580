"""Solvers: the contract they fulfil, and the registry that finds them by name."""

from invlayer_core.solvers.contract import (
    BatchProblem,
    Problem,
    SampleProblem,
    Solver,
    SolverResult,
    Status,
)
from invlayer_core.solvers.direct import Factor, SparseDirectSolver, SparseMatrix
from invlayer_core.solvers.discovery import Plugin, PluginFailure
from invlayer_core.solvers.hookspecs import (
    ENTRY_POINT_GROUP,
    PROJECT_NAME,
    SolverHooks,
    hookimpl,
    hookspec,
)
from invlayer_core.solvers.linear_spec import LinearSolverSpec
from invlayer_core.solvers.listing import SolverListing
from invlayer_core.solvers.lookup import (
    get_solver,
    get_spec,
    linear_solvers,
    register_linear_solver,
    register_solver,
    solvers,
)
from invlayer_core.solvers.quadratic import BatchQuadraticProblem, CoordinateMatrix, QuadraticProblem
from invlayer_core.solvers.registry import Registry, get_registry
from invlayer_core.solvers.spec import API_VERSION, KINDS, SolverSpec

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "KINDS",
    "PROJECT_NAME",
    "BatchProblem",
    "BatchQuadraticProblem",
    "CoordinateMatrix",
    "Factor",
    "LinearSolverSpec",
    "Plugin",
    "PluginFailure",
    "Problem",
    "QuadraticProblem",
    "Registry",
    "SampleProblem",
    "Solver",
    "SolverHooks",
    "SolverListing",
    "SolverResult",
    "SolverSpec",
    "SparseDirectSolver",
    "SparseMatrix",
    "Status",
    "get_registry",
    "get_solver",
    "get_spec",
    "hookimpl",
    "hookspec",
    "linear_solvers",
    "register_linear_solver",
    "register_solver",
    "solvers",
]
