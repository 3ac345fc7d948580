"""SciPy matrices of a cone program, and checks that the adapters share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.sparse import csc_matrix

import invlayer_core as inv

__all__ = ["as_scipy", "refuse_cones", "refuse_options"]


def as_scipy(matrix: inv.CSC) -> csc_matrix:
    """The matrix for SciPy, sharing its arrays."""
    return csc_matrix((matrix.values, matrix.rows, matrix.pointers), shape=matrix.shape)


def refuse_options(solver: str, unknown: Any, accepted: Any) -> None:
    """Raise ``TypeError`` if there are unknown options."""
    if unknown:
        raise TypeError(
            f"{solver}: unknown option {', '.join(sorted(unknown))}; accepted are "
            f"{', '.join(sorted(accepted))}."
        )


def refuse_cones(solver: str, cones: inv.Cones, accepted: Mapping[str, bool]) -> None:
    """Raise ``ConditionsError`` if the program has a cone that the solver does not know."""
    found = [name for name, able in accepted.items() if not able and getattr(cones, name)]
    if found:
        raise inv.ConditionsError(
            f"{solver} came with {cones}; it does not know the cones {', '.join(found)}. Accepted with "
            "them is solver='cvxpy.clarabel' or 'cvxpy.scs'."
        )
