"""Which linear solver suits the derivative of a cone program, by its size and structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import invlayer_core as inv
from invlayer_cvxpy.kkt import RegularisedLU
from invlayer_cvxpy.schur import SchurCholesky

__all__ = ["MOST", "is_dense_quadratic", "sparse_adjoint", "with_pattern"]

_FEW = 0.06  # of the entries of a Jacobian: more are not sparse
_HUGE = 100_000  # unknowns from which factors may not fit into memory
MOST = 2**27
"""Entries of dense matrices for the whole batch: 1 GiB."""


def sparse_adjoint(structure: inv.ConeStructure) -> inv.adjoints.Adjoint | None:
    """For large Jacobians sparse LU, Cholesky factors of the Schur complement, or LSMR; None for small ones.

    All give an answer where J is singular but the system has a solution: the variables that CVXPY adds
    for the epigraph of a constraint are not unique if it is not active.
    """
    if structure.places is None:
        return None
    size = structure.size + structure.equations
    pattern = inv.jacobians.SparsityPattern(*structure.places, (size, size))
    few = pattern.nnz < _FEW * size**2
    if few and size > _HUGE:
        return inv.adjoints.Implicit(linear_solver=inv.linear.SparseLU(pattern, "scipy.lsmr"))
    direct = RegularisedLU(structure.size) if few else SchurCholesky(structure.size, structure.cones)
    return inv.adjoints.Implicit(linear_solver=inv.linear.SparseLU(pattern, direct))


def with_pattern(adjoint: Any, structure: inv.ConeStructure) -> Any:
    """The user's adjoint, with the pattern that a sparse one is to be given."""
    method = getattr(adjoint, "linear_solver", None)
    if not isinstance(method, inv.linear.SparseLU) or method.pattern is not None or structure.places is None:
        return adjoint
    size = structure.size + structure.equations
    pattern = inv.jacobians.SparsityPattern(*structure.places, (size, size))
    return replace(adjoint, linear_solver=replace(method, pattern=pattern))


def is_dense_quadratic(structure: inv.ConeStructure) -> bool:
    """Whether the programs are quadratic, and best solved by the dense factors of their active sets."""
    size = structure.size + structure.equations
    return structure.cones.is_polyhedral and (
        structure.places is None or structure.places[0].numel() >= _FEW * size**2
    )
