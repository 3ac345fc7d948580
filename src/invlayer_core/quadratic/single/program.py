"""One program on the host: its matrices as NumPy arrays or by their entries, and what a point satisfies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
from torch import Size, Tensor

from invlayer_core.conditions.quadratic import QuadraticLayout
from invlayer_core.execution.convexity import SEMIDEFINITE, not_convex
from invlayer_core.linear.saddle_point.entries import Entries, symmetric_part
from invlayer_core.linear.saddle_point.sparse import entries_of
from invlayer_core.matrices import SparseForm
from invlayer_core.quadratic.single.cores import largest
from invlayer_core.solvers.quadratic import CoordinateMatrix, QuadraticProblem

__all__ = ["HostProgram", "Matrix", "Standing"]

_LARGEST = 2000  # variables of a dense program up to which what the general way does beside costs anything

Matrix = np.ndarray | Entries


@final
class Standing(NamedTuple):
    """Relative slacks, multipliers and stationarity of a point, as by ``conditions.quadratic.measure``."""

    slack: np.ndarray
    weight: np.ndarray
    stationarity: float


@final
@dataclass(frozen=True, eq=False)
class HostProgram:
    """min ½ xᵀPx + qᵀx such that C x ≤ d, with the rows of A, of G, and of the bounds.

    Attributes
    ----------
    layout : QuadraticLayout
    P : ndarray or Entries
        Symmetric and positive definite; if sparse, not seen to be indefinite.
    lower : ndarray or None
        The Cholesky factor of a dense P.
    given : mapping of str to ndarray or Entries
        The arguments but P.
    blocks : tuple of ndarray or Entries
        A and G, those that are there.
    d, scales : ndarray of shape ``(m,)``
        Limits, and the norms of the rows of C.
    least : float
        ‖q‖ / ‖P‖, a unit for x where it is zero but for rounding.
    """

    layout: QuadraticLayout
    P: Any
    lower: np.ndarray | None
    given: Mapping[str, Any]
    blocks: tuple[Any, ...]
    d: np.ndarray
    scales: np.ndarray
    least: float

    @classmethod
    def of(cls, layout: QuadraticLayout, theta: Sequence[Tensor]) -> HostProgram | None:
        """The program; None if it is too large, not convex or not finite."""
        given: dict[str, Any] = {}
        for name, tensor in zip(layout.names, theta, strict=True):
            form = layout.forms.get(name)
            given[name] = (
                entries_of(form, tensor) if isinstance(form, SparseForm) else tensor.detach().numpy()
            )
        P = given.pop("P", None)
        if P is None or not _is_usable(P, given):
            return None
        found = _convex(layout, theta, P)
        if found is None:
            return None
        blocks = tuple(given[name] for name in ("A", "G") if name in given)
        d = _joined([-given[name] if name == "lb" else given[name] for name in _LIMITS if name in given])
        scales = [_row_norms(block) for block in blocks]
        scales += [np.ones(layout.size) for name in ("lb", "ub") if name in given]
        steepest = largest((found[0].value if isinstance(found[0], Entries) else found[0]).ravel())
        least = largest(given["q"]) / steepest if steepest else 0.0
        return cls(layout, *found, given, blocks, d, _joined(scales), least)

    def problem(self) -> QuadraticProblem:
        """For the solver, which may write into its arrays."""
        return QuadraticProblem(0, _copied(self.P), **{name: _copied(m) for name, m in self.given.items()})

    def applied(self, x: np.ndarray) -> np.ndarray:
        """C x."""
        parts = [block @ x for block in self.blocks]
        if "lb" in self.given:
            parts.append(-x)
        if "ub" in self.given:
            parts.append(x)
        return _joined(parts)

    def reaction(self, multipliers: np.ndarray) -> np.ndarray | float:
        """Cᵀμ."""
        total: np.ndarray | float = 0.0
        start = 0
        for block in self.blocks:
            total = total + block.T @ multipliers[start : start + block.shape[0]]
            start += block.shape[0]
        if "lb" in self.given:
            total = total - multipliers[start : start + self.layout.size]
        return total + multipliers[-self.layout.size :] if "ub" in self.given else total

    def measured(self, z: np.ndarray) -> Standing:
        """Slacks, multipliers and stationarity at z = (x, μ)."""
        x, multipliers = z[: self.layout.size], z[self.layout.size :]
        q, curved = self.given["q"], self.P @ x
        gradient = curved + q
        if not len(multipliers):
            force = max(largest(curved), largest(q)) or 1.0
            return Standing(multipliers, multipliers, largest(gradient) / force)
        weight = multipliers * self.scales
        force = max(largest(curved), largest(q), largest(weight)) or 1.0
        slack = (self.d - self.applied(x)) / (self.scales * (max(largest(x), self.least) or 1.0))
        return Standing(slack, weight / force, largest(gradient + self.reaction(multipliers)) / force)


_LIMITS = ("b", "h", "lb", "ub")


def _is_usable(P: Matrix, given: Mapping[str, Any]) -> bool:
    """Whether it is of a size for this way, and holds what a solver may be given."""
    if isinstance(P, np.ndarray) and len(P) > _LARGEST:
        return False
    total = _square(P) + _square(given["q"])
    for name in ("G", "A", "b"):
        if name in given:
            total += _square(given[name])
    if not math.isfinite(total):  # also where it overflows
        return False
    return all(bool((given[n] > -math.inf).all()) for n in ("h", "ub") if n in given) and (
        "lb" not in given or bool((given["lb"] < math.inf).all())
    )


def _square(matrix: Matrix) -> float:
    values = matrix if isinstance(matrix, np.ndarray) else matrix.value
    return float(np.vdot(values, values))


def _convex(
    layout: QuadraticLayout, theta: Sequence[Tensor], P: Matrix
) -> tuple[Matrix, np.ndarray | None] | None:
    """½ (P + Pᵀ), and its Cholesky factor if it is dense; None unless it is convex for all one can see."""
    if isinstance(P, Entries):
        if np.array_equal(P.row, P.column):
            return (P, None) if P.value.min(initial=0.0) >= -SEMIDEFINITE * largest(P.value) else None
        detached = layout.program([tensor.detach() for tensor in theta])
        return (symmetric_part(P), None) if not_convex(detached, Size()) is None else None
    if (P != P.T).any():
        P = 0.5 * (P + P.T)
    try:
        return P, np.linalg.cholesky(P)
    except np.linalg.LinAlgError:
        return None


def _row_norms(matrix: Matrix) -> np.ndarray:
    if isinstance(matrix, Entries):
        norms = np.sqrt(np.bincount(matrix.row, matrix.value * matrix.value, matrix.shape[0]))
    else:
        norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    norms[norms == 0] = 1.0
    return norms


def _copied(matrix: Any) -> Any:
    if isinstance(matrix, Entries):
        return CoordinateMatrix(matrix.shape, matrix.row, matrix.column, matrix.value.copy())
    return matrix.copy()


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0)
