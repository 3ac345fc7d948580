"""Preconditioners of the Krylov methods: approximate inverses M⁻¹ of J, and of Jᵀ by their transpose.

GMRES and BiCGStab solve A M⁻¹ u = b, x = M⁻¹ u: what they see as their residual, b − A M⁻¹ u, is then that
of x itself (right preconditioning; Saad, *Iterative Methods for Sparse Linear Systems*, 2003, section 9.3).
CG keeps its symmetry by M as its inner product (section 9.2). A solution is accepted by its residual alone,
and differentiated by the conditions it satisfies: no preconditioner can change what a derivative is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.diagonal import jacobian_diagonal
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.jacobians.pattern import SparsityPattern

__all__ = ["Jacobi", "OfInnerSystem", "Preconditioner", "PreconditionerLike", "preconditioner_of"]

Product = Callable[[Tensor], Tensor]


class Preconditioner(ABC):
    """A way to an approximate inverse of J at one point."""

    @abstractmethod
    def prepare(self, linearization: Linearization, *, transpose: bool) -> Product:
        """M⁻¹, or M⁻ᵀ, as a map of ``(B, n)`` to ``(B, n)``, without gradient."""


PreconditionerLike = Literal["jacobi"] | Preconditioner | Callable[..., Tensor]


def preconditioner_of(called: str, chosen: Any) -> Preconditioner | None:
    """The preconditioner that a setting stands for.

    Raises
    ------
    ConditionsError
        If it stands for none.
    """
    if chosen is None or isinstance(chosen, Preconditioner):
        return chosen
    if chosen == "jacobi":
        return Jacobi()
    if callable(chosen):
        return Given(chosen)
    raise ConditionsError(
        f"{called}(preconditioner={chosen!r}): accepted are 'jacobi', an inv.linear.Jacobi(pattern), a "
        "callable (r, y, *args) -> M⁻¹ r, or None."
    )


@final
@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """The diagonal of J: for equations or unknowns of very different sizes.

    It is read from ``jacobian=``, where there is one, be it dense or sparse. Without, it takes one pullback
    for each colour of ``pattern``; and without that one for each equation, which costs as much as that many
    steps.

    Parameters
    ----------
    pattern : SparsityPattern or Tensor, optional
        Where the Jacobian of one system can be non-zero, as in :class:`SparseLU`.

    Examples
    --------
    >>> import torch
    >>> Jacobi(torch.eye(3, dtype=torch.bool)).pattern
    SparsityPattern(3 x 3, 3 entries)
    """

    pattern: SparsityPattern | Tensor | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            object.__setattr__(self, "pattern", SparsityPattern.of(self.pattern))

    def prepare(self, linearization: Linearization, *, transpose: bool) -> Product:
        assert self.pattern is None or isinstance(self.pattern, SparsityPattern)
        diagonal = jacobian_diagonal(linearization, self.pattern)
        # An equation without its own unknown, or NaN, is left as it is: the residual has the last word.
        inverse = torch.where(
            (diagonal != 0) & diagonal.isfinite(), 1.0 / diagonal, torch.ones_like(diagonal)
        )
        return lambda vector: vector * inverse


@final
@dataclass(frozen=True)
class Given(Preconditioner):
    """The user's ``(r, y, *args) -> M⁻¹ r``, linear in r; its transpose is its own, or its pullback."""

    function: Callable[..., Tensor]

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def prepare(self, linearization: Linearization, *, transpose: bool) -> Product:
        system, value = linearization.system, linearization.value
        y = linearization.y.detach()
        args = system.arguments.unflatten([tensor.detach() for tensor in linearization.theta])
        own = getattr(self.function, "transposed", None)
        if transpose and own is not None:
            return lambda vector: self._checked(own(vector.reshape(y.shape), y, *args), vector)
        if not transpose:
            return lambda vector: self._checked(self.function(vector.reshape(value.shape), y, *args), vector)
        return self._pullback(lambda r: self._checked(self.function(r, y, *args), y), value.detach())

    def _pullback(self, function: Product, like: Tensor) -> Product:
        """The transpose of a linear map, by one reverse pass."""
        if _functorch.is_active():
            mapped, pull = torch.func.vjp(function, torch.zeros_like(like))[:2]
            return lambda vector: pull(vector.reshape(mapped.shape))[0].reshape(vector.shape)
        with torch.enable_grad():
            point = torch.zeros_like(like).requires_grad_()
            mapped = function(point)
        if not mapped.requires_grad:
            raise ConditionsError(
                f"preconditioner={self!r} has to be transposed for the derivative, and torch does not see "
                "how its result depends on r. Accepted is a torch function of r; or one with an attribute "
                "transposed, a function (r, y, *args) -> M⁻ᵀ r."
            )

        def transposed(vector: Tensor) -> Tensor:
            (pulled,) = _functorch.gradients((mapped,), (point,), (vector.reshape(mapped.shape),), False)
            assert pulled is not None
            return pulled.reshape(vector.shape)

        return transposed

    def _checked(self, result: Any, like: Tensor) -> Tensor:
        if isinstance(result, Tensor) and result.numel() == like.numel():
            return result.reshape(like.shape)
        came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ConditionsError(
            f"preconditioner={self!r} returned {came} for {like.numel()} numbers; accepted is a tensor in "
            "the shape of y (transposed: of the residual)."
        )


@final
@dataclass(frozen=True)
class OfInnerSystem(Preconditioner):
    """For the conditions A(y, θ) x − b = 0 of a linear solve, whose Jacobian is A = J or Jᵀ: that of J again.

    Attributes
    ----------
    of : Preconditioner
    system : System
        The conditions whose Jacobian J is.
    transposed : bool
        Whether A is its transpose.
    """

    of: Preconditioner
    system: System
    transposed: bool

    def prepare(self, linearization: Linearization, *, transpose: bool) -> Product:
        y, *theta = (tensor.detach() for tensor in linearization.theta[1:])  # after b
        outer = linearize(self.system, y, theta)
        return self.of.prepare(outer, transpose=transpose != self.transposed)
