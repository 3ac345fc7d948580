"""Batched linear solves with the Jacobian, and the decision on singular ones."""

from invlayer_core.linear.methods import CG, GMRES, LU, BiCGStab, Krylov, LinearSolver, Neumann

__all__ = ["CG", "GMRES", "LU", "BiCGStab", "Krylov", "LinearSolver", "Neumann"]
