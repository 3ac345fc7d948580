"""What a solver of quadratic programs is given.

A plugin author writes one class with one method, as for every kind::

    class MyQP(Solver):
        def solve(self, problem, y0, options):
            x, y, z = my_qp(problem.P, problem.q, problem.G, problem.h, problem.A, problem.b)
            return SolverResult(y=problem.answer(x, equality=y, inequality=z))

``problem`` is a :class:`QuadraticProblem`, one program in float64 NumPy; or, for a solver with
``batched=True``, a :class:`BatchQuadraticProblem`, all of them in torch. ``y0`` is the initial x, or zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BatchQuadraticProblem", "CoordinateMatrix", "QuadraticProblem"]


@final
@dataclass(frozen=True, eq=False)
class CoordinateMatrix:
    """A sparse matrix by its entries: ``scipy.sparse.coo_matrix((values, (rows, columns)), shape)``.

    Attributes
    ----------
    shape : tuple of two int
    rows, columns : ndarray of int64 ``(nnz,)``
    values : ndarray of float64 ``(nnz,)``
        Those of entries that are there more than once add up.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


@final
@dataclass(frozen=True, eq=False)
class QuadraticProblem:
    """min ½ xᵀPx + qᵀx subject to Gx ≤ h, Ax = b, lb ≤ x ≤ ub: one program in float64 NumPy.

    The arrays are private copies, but for the pattern of a sparse matrix.

    Attributes
    ----------
    index : int
        Which sample of the batch this is.
    P : ndarray ``(n, n)``, CoordinateMatrix or None
        Symmetric; None for a linear program.
    q : ndarray ``(n,)``
    G, A : ndarray ``(m, n)``, CoordinateMatrix or None
    h, b : ndarray ``(m,)`` or None
    lb, ub : ndarray ``(n,)`` or None
        Infinite where there is no bound.
    kind, size : str, int
        ``"qp"``, and n.
    """

    index: int
    P: np.ndarray | CoordinateMatrix | None
    q: np.ndarray
    G: np.ndarray | CoordinateMatrix | None = None
    h: np.ndarray | None = None
    A: np.ndarray | CoordinateMatrix | None = None
    b: np.ndarray | None = None
    lb: np.ndarray | None = None
    ub: np.ndarray | None = None
    kind: str = "qp"

    @property
    def size(self) -> int:
        """n, the number of variables."""
        return int(self.q.shape[0])

    def answer(
        self,
        x: Any,
        *,
        equality: Any = None,
        inequality: Any = None,
        lower: Any = None,
        upper: Any = None,
    ) -> np.ndarray:
        """x and its multipliers as one vector, the ``y`` of a :class:`SolverResult`.

        Parameters
        ----------
        x : array_like of shape ``(n,)``
        equality, inequality, lower, upper : array_like, optional
            The multipliers of A x = b, of G x ≤ h and of both bounds: P x + q + Aᵀν + Gᵀλ − λ_lb + λ_ub = 0.
            Leave out what the solver does not tell; it is then found from x.
        """
        import numpy as np  # which a per-sample solver has anyway

        parts = [_vector(x, self.size)]
        for present, limit, given in (
            (self.b is not None, self.b, equality),
            (self.h is not None, self.h, inequality),
            (self.lb is not None, self.lb, lower),
            (self.ub is not None, self.ub, upper),
        ):
            if present:
                assert limit is not None
                parts.append(_vector(given, int(limit.shape[0])))
        return np.concatenate(parts)


def _vector(given: Any, size: int) -> np.ndarray:
    import numpy as np

    if given is None:
        return np.full(size, np.nan)
    return np.asarray(given, dtype=np.float64).reshape(-1)


@final
@dataclass(frozen=True, eq=False)
class BatchQuadraticProblem:
    """B quadratic programs in torch, where the caller's tensors live.

    Attributes
    ----------
    batch : int
        B.
    P, q, G, h, A, b, lb, ub : Tensor or None
        As in :class:`QuadraticProblem`, dense, each with one leading dim of size B, or 1 where all samples
        share it.
    kind, size : str, int
        ``"qp"``, and n.
    """

    batch: int
    P: Tensor | None
    q: Tensor
    G: Tensor | None = None
    h: Tensor | None = None
    A: Tensor | None = None
    b: Tensor | None = None
    lb: Tensor | None = None
    ub: Tensor | None = None
    kind: str = "qp"

    @property
    def size(self) -> int:
        """n, the number of variables."""
        return self.q.shape[-1]
