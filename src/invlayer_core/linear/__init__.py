"""Batched linear solves with the Jacobian, and the decision on singular ones."""

from invlayer_core.linear.auto import Auto
from invlayer_core.linear.iterative import CG, GMRES, BiCGStab, Krylov, Neumann
from invlayer_core.linear.methods import LU, Cholesky, LinearSolver, Lstsq
from invlayer_core.linear.preconditioners import Jacobi
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.solvers.direct import Factor, SparseDirectSolver, SparseMatrix

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "Auto",
    "BiCGStab",
    "Cholesky",
    "Factor",
    "Jacobi",
    "Krylov",
    "LinearSolver",
    "Lstsq",
    "Neumann",
    "SparseDirectSolver",
    "SparseLU",
    "SparseMatrix",
]
