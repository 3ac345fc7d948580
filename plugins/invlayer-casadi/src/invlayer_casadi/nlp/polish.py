"""Newton steps on the conditions of one sample, each kept only where it lowers the residual."""

from __future__ import annotations

from typing import Final

import numpy as np

from invlayer_casadi.nlp.factor import KKTMatrix
from invlayer_casadi.nlp.sample import SampleData, SamplePoint

__all__ = ["polished"]

_NEAR: Final = 1e-2  # a residual from which Newton's method goes to the solution that CasADi found
_DONE: Final = 1e-14
_GAIN: Final = 0.1


def polished(point: SamplePoint, z: np.ndarray, data: SampleData, most: int) -> KKTMatrix | None:
    """Take up to ``most`` steps from z, which is changed; the matrix at the result, if it is known."""
    second = point.second(z, data)
    at = point.evaluate(z, data)
    if not at.size <= _NEAR * (1.0 + np.abs(at.value).max(initial=0.0)):  # NaN, or a failure
        return None
    matrix = None
    for _ in range(most):
        nearby, matrix = matrix, point.matrix(z, data, at, second)
        if at.size <= _DONE * (1.0 + np.abs(at.value).max(initial=0.0)):
            return point.matrix(z, data, at, second, nearby)
        moved = z - matrix.solve(at.residual)
        new = point.evaluate(moved, data)
        if not new.size < at.size:
            return matrix
        settled = new.size > _GAIN * at.size  # rounding error is all that is left
        z[:], at = moved, new
        second = point.second(z, data)
        if settled:
            break
    return point.matrix(z, data, at, second, matrix)
