"""The linear solvers that an adjoint can be given, as settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from invlayer_core.linear.krylov import KrylovSolution, Product, bicgstab, conjugate_gradients, gmres, neumann

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "BiCGStab",
    "Cholesky",
    "Krylov",
    "LinearSolver",
    "Lstsq",
    "Neumann",
]


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


class Krylov(LinearSolver):
    """A matrix-free method: J is never formed, one product with it serves the whole batch."""

    needs_blocks = False

    @property
    def matrix_free(self) -> bool:
        return True

    @abstractmethod
    def solve(self, product: Product, rhs: Tensor) -> KrylovSolution:
        """Solve for ``rhs`` ``(B, n)``, given the products of ``(B, n)``."""

    @abstractmethod
    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual that counts as solved."""


def _tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.65 if rtol is None else rtol


@final
@dataclass(frozen=True)
class GMRES(Krylov):
    """Restarted GMRES: the safe choice without structure.

    Parameters
    ----------
    rtol : float, optional
        Relative residual at which a sample is solved; 7e-11 in float64, 3e-5 in float32.
    maxiter : int
        Most products with J.
    restart : int
        Size of the Krylov space, and so the number of stored vectors per sample.
    check_every : int
        Steps between two looks at the residual, which also ends a space early; each look costs a GPU one
        synchronisation.
    """

    rtol: float | None = None
    maxiter: int = 500
    restart: int = 40
    check_every: int = 4

    def solve(self, product: Product, rhs: Tensor) -> KrylovSolution:
        tolerance = self.tolerance(rhs.dtype)
        return gmres(
            product,
            rhs,
            rtol=tolerance,
            maxiter=self.maxiter,
            restart=self.restart,
            check_every=self.check_every,
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        return _tolerance(self.rtol, dtype)


@final
@dataclass(frozen=True)
class BiCGStab(Krylov):
    """BiCGStab: two products a step and constant memory, less smooth than GMRES.

    Parameters
    ----------
    rtol : float, optional
        As in :class:`GMRES`.
    maxiter : int
        Most steps.
    check_every : int
        Steps between two looks at the residual; each look costs a GPU one synchronisation.
    """

    rtol: float | None = None
    maxiter: int = 250
    check_every: int = 5

    def solve(self, product: Product, rhs: Tensor) -> KrylovSolution:
        tolerance = self.tolerance(rhs.dtype)
        return bicgstab(product, rhs, rtol=tolerance, maxiter=self.maxiter, check_every=self.check_every)

    def tolerance(self, dtype: torch.dtype) -> float:
        return _tolerance(self.rtol, dtype)


@final
@dataclass(frozen=True)
class CG(Krylov):
    """Conjugate gradients: for Jacobians that are symmetric positive definite, and only for them.

    Parameters
    ----------
    rtol, maxiter, check_every
        As in :class:`BiCGStab`.
    """

    rtol: float | None = None
    maxiter: int = 500
    check_every: int = 5

    def solve(self, product: Product, rhs: Tensor) -> KrylovSolution:
        tolerance = self.tolerance(rhs.dtype)
        return conjugate_gradients(
            product, rhs, rtol=tolerance, maxiter=self.maxiter, check_every=self.check_every
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        return _tolerance(self.rtol, dtype)


@final
@dataclass(frozen=True)
class Neumann(Krylov):
    """The Neumann series, for fixed points of contractions: one product a step, and nothing else.

    A fixed point y = T(y) has J = T′ − I; where T contracts, x ← T′x − b converges as the forward iteration
    does. For a root F it converges if y + F(y) contracts. Elsewhere it does not, which is an error.

    Parameters
    ----------
    rtol, maxiter, check_every
        As in :class:`BiCGStab`.

    References
    ----------
    Bai, Koltun & Kolter, Stabilizing Equilibrium Models by Jacobian Regularization (2021), section 2.
    """

    rtol: float | None = None
    maxiter: int = 500
    check_every: int = 4

    def solve(self, product: Product, rhs: Tensor) -> KrylovSolution:
        tolerance = self.tolerance(rhs.dtype)
        return neumann(product, rhs, rtol=tolerance, maxiter=self.maxiter, check_every=self.check_every)

    def tolerance(self, dtype: torch.dtype) -> float:
        return _tolerance(self.rtol, dtype)
