"""Batched linear solves with the Jacobian, and the decision on singular ones."""

from invlayer_core.linear.methods import CG, GMRES, LU, BiCGStab, Krylov, LinearSolver, Neumann
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.solvers.direct import Factor, SparseDirectSolver, SparseMatrix

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "BiCGStab",
    "Factor",
    "Krylov",
    "LinearSolver",
    "Neumann",
    "SparseDirectSolver",
    "SparseLU",
    "SparseMatrix",
]
