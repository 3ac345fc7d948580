"""What a sparse direct solver is given, and what it gives back.

A plugin author writes one class with one method::

    class Cholmod(SparseDirectSolver):
        def factorise(self, matrix, options):
            factor = cholmod(csc_matrix((matrix.values, matrix.rows, matrix.column_pointers)))
            return Factor(factor.solve, factor.solve_transposed)

It sees one matrix at a time, in float64 NumPy. Batches, refinement, certification and derivatives are
invlayer's affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from invlayer_core.errors import ConditionsError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Factor", "SparseDirectSolver", "SparseMatrix", "handed_factors", "is_factors"]


@final
@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """One square matrix in compressed sparse column (CSC) form, in NumPy.

    Attributes
    ----------
    size : int
        n.
    column_pointers : ndarray of int32, shape ``(n + 1,)``
        Column j is made of the entries ``column_pointers[j]`` to ``column_pointers[j + 1]``.
    rows : ndarray of int32, shape ``(nnz,)``
        Their rows, ascending within a column, each once.
    values : ndarray of float64, shape ``(nnz,)``
        Finite; zeros may be among them.
    symmetric_pattern : bool
        Whether (i, j) is an entry wherever (j, i) is one; their values may differ.
    """

    size: int
    column_pointers: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    symmetric_pattern: bool


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """A factorised matrix A, known by its solves.

    A forward solver that has factorised J near the solution can hand it over in this form, and the backward
    pass then starts from it; see :class:`~invlayer_core.linear.SparseLU`. It need not be exact: what it gives
    is refined and measured.

    Attributes
    ----------
    solve : callable
        ``b -> A⁻¹ b``, float64 NumPy vectors of shape ``(n,)``; b is not to be changed.
    solve_transposed : callable
        ``b -> A⁻ᵀ b``.

    Examples
    --------
    >>> from scipy.sparse import csc_matrix
    >>> from scipy.sparse.linalg import splu
    >>> lu = splu(csc_matrix([[2.0, 0.0], [1.0, 4.0]]))
    >>> factor = Factor(lu.solve, lambda b: lu.solve(b, trans="T"))
    """

    solve: Callable[[np.ndarray], np.ndarray]
    solve_transposed: Callable[[np.ndarray], np.ndarray]


class SparseDirectSolver(ABC):
    """An adapter around one sparse direct solver; immutable, so that one instance may serve many calls."""

    @abstractmethod
    def factorise(self, matrix: SparseMatrix, options: Mapping[str, Any]) -> Factor:
        """Factorise one matrix.

        Parameters
        ----------
        matrix : SparseMatrix
        options : mapping
            The user's ``SparseLU(options=)`` unchanged. Unknown names must raise ``TypeError``.

        Returns
        -------
        Factor
            For a singular matrix raise ``ArithmeticError``, or return a factor whose solves are not finite:
            either concerns that one sample alone.
        """


def is_factors(value: Any) -> bool:
    """Whether ``value`` is a :class:`Factor`, or a list or tuple of them (None among them allowed)."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(each, Factor) for each in value) and all(
            each is None or isinstance(each, Factor) for each in value
        )
    return isinstance(value, Factor)


def handed_factors(aux: Sequence[Any], count: int) -> tuple[Factor | None, ...]:
    """The factors among what a forward solve returned besides y, one per sample; empty if there are none.

    A solver function hands over ``(y, factor)``, ``(y, [factor, ...])`` or ``(y, {"factor": ...})``, a
    registered solver ``SolverResult(aux={"factor": factor})``.

    Raises
    ------
    ConditionsError
        If there are some, but not one per sample.
    """
    if not aux:
        return ()
    named = [each.get("factor") if isinstance(each, Mapping) else each for each in aux]
    factors: Any = named[0] if len(named) == 1 else named
    if not is_factors(factors):
        return ()
    factors = (factors,) if isinstance(factors, Factor) else tuple(factors)
    if len(factors) != count:
        raise ConditionsError(
            f"the forward solve handed over {len(factors)} factors for a batch of {count} systems; accepted "
            "is one Factor for each, in row-major order (None where there is none), or no factor at all."
        )
    return factors
