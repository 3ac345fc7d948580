"""The linear solvers that an adjoint can be given, as settings: those that take J as dense blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

__all__ = ["LU", "Cholesky", "LinearSolver", "Lstsq"]


class LinearSolver(ABC):
    """A way to solve J x = b and Jᵀ x = b.

    Attributes
    ----------
    matrix_free : bool
        Whether J is known by its products alone.
    needs_blocks : bool
        Whether it takes J as dense blocks, one per sample.
    """

    needs_blocks: ClassVar[bool] = True

    @property
    @abstractmethod
    def matrix_free(self) -> bool: ...


@final
@dataclass(frozen=True)
class LU(LinearSolver):
    """Dense Jacobian blocks and one batched LU: exact, and the fastest way up to some hundred unknowns."""

    @property
    def matrix_free(self) -> bool:
        return False


@final
@dataclass(frozen=True)
class Cholesky(LinearSolver):
    """Dense blocks and one batched Cholesky factorisation: for symmetric positive definite Jacobians.

    Half the work of LU, as for the Hessian of a strictly convex objective. It reads one triangle of J; where
    J is not what it takes it for, the check of the backward solve notices, LU answers, and a
    ``PerformanceWarning`` says so. Passes that are themselves recorded, mapped or in forward mode take LU.
    """

    @property
    def matrix_free(self) -> bool:
        return False


@final
@dataclass(frozen=True)
class Lstsq(LinearSolver):
    """The least-squares solution of least norm, for every sample, by singular values.

    For conditions with redundant equations, or with more or fewer equations than unknowns: the derivative is
    by the Moore–Penrose inverse J⁺ everywhere, where ``Implicit(singular="lstsq")`` takes it for singular
    samples alone. Derivatives of every order as long as the rank stays what it is (Golub & Pereyra 1973).
    """

    @property
    def matrix_free(self) -> bool:
        return False
