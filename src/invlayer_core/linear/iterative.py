"""The matrix-free linear solvers that an adjoint can be given, as settings."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.system import System
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.linear.krylov import (
    KrylovSolution,
    Product,
    bicgstab,
    conjugate_gradients,
    gmres,
    neumann,
    right_preconditioned,
)
from invlayer_core.linear.methods import LinearSolver
from invlayer_core.linear.preconditioners import OfInnerSystem, PreconditionerLike, preconditioner_of

__all__ = ["CG", "GMRES", "BiCGStab", "Krylov", "Neumann"]


class Krylov(LinearSolver):
    """A matrix-free method: J is never formed, one product with it serves the whole batch.

    Attributes
    ----------
    preconditioner : "jacobi", Preconditioner, callable or None
        Of the methods that take one.
    """

    needs_blocks = False
    preconditioner: PreconditionerLike | None = None

    def __post_init__(self) -> None:
        preconditioner_of(type(self).__name__, self.preconditioner)

    @property
    def matrix_free(self) -> bool:
        return True

    @abstractmethod
    def solve(self, product: Product, rhs: Tensor, precondition: Product | None = None) -> KrylovSolution:
        """Solve for ``rhs`` ``(B, n)``, given the products of ``(B, n)`` with A, and with some M⁻¹ ≈ A⁻¹."""

    @abstractmethod
    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual that counts as solved."""

    def prepare(self, linearization: Linearization, *, transpose: bool) -> Product | None:
        """The preconditioner of J, or of Jᵀ, at one point; None if there is none."""
        chosen = preconditioner_of(type(self).__name__, self.preconditioner)
        return None if chosen is None else chosen.prepare(linearization, transpose=transpose)

    def of_inner_system(self, system: System, transposed: bool) -> Krylov:
        """The same method for the conditions A x − b = 0 of its own solves, A = J or Jᵀ of ``system``."""
        chosen = preconditioner_of(type(self).__name__, self.preconditioner)
        if chosen is None:
            return self
        inner = OfInnerSystem(chosen, system, transposed)
        return replace(self, preconditioner=inner)  # type: ignore[type-var]


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
    preconditioner : "jacobi", Jacobi, or callable ``(r, y, *args) -> M⁻¹ r``, optional
        An approximate inverse M⁻¹ of J, for ill-conditioned systems: the diagonal of J
        (:class:`~invlayer_core.linear.Jacobi`), or a function of your own, linear in the residuals r, and
        whole-tensor as the conditions are. For derivatives in reverse mode it is transposed by torch; where
        torch does not see into it, give it an attribute ``transposed``, a function ``(r, y, *args)`` that
        applies M⁻ᵀ. A pytree of unknowns, or complex ones, come as one real vector per sample. It changes
        the number of steps, never the solution: that is accepted by its own residual.
    """

    rtol: float | None = None
    maxiter: int = 500
    restart: int = 40
    check_every: int = 4
    preconditioner: PreconditionerLike | None = None

    def solve(self, product: Product, rhs: Tensor, precondition: Product | None = None) -> KrylovSolution:
        by_gmres = functools.partial(
            gmres,
            rhs=rhs,
            rtol=self.tolerance(rhs.dtype),
            maxiter=self.maxiter,
            restart=self.restart,
            check_every=self.check_every,
        )
        return right_preconditioned(by_gmres, product, precondition)

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
    preconditioner
        As in :class:`GMRES`.
    """

    rtol: float | None = None
    maxiter: int = 250
    check_every: int = 5
    preconditioner: PreconditionerLike | None = None

    def solve(self, product: Product, rhs: Tensor, precondition: Product | None = None) -> KrylovSolution:
        by_bicgstab = functools.partial(
            bicgstab,
            rhs=rhs,
            rtol=self.tolerance(rhs.dtype),
            maxiter=self.maxiter,
            check_every=self.check_every,
        )
        return right_preconditioned(by_bicgstab, product, precondition)

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
    preconditioner
        As in :class:`GMRES`; symmetric positive definite, too.
    """

    rtol: float | None = None
    maxiter: int = 500
    check_every: int = 5
    preconditioner: PreconditionerLike | None = None

    def solve(self, product: Product, rhs: Tensor, precondition: Product | None = None) -> KrylovSolution:
        return conjugate_gradients(
            product,
            rhs,
            rtol=self.tolerance(rhs.dtype),
            maxiter=self.maxiter,
            check_every=self.check_every,
            precondition=precondition,
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

    def solve(self, product: Product, rhs: Tensor, precondition: Product | None = None) -> KrylovSolution:
        assert precondition is None, "the series has no place for one"
        tolerance = self.tolerance(rhs.dtype)
        return neumann(product, rhs, rtol=tolerance, maxiter=self.maxiter, check_every=self.check_every)

    def tolerance(self, dtype: torch.dtype) -> float:
        return _tolerance(self.rtol, dtype)
