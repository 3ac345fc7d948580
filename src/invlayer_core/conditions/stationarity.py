"""Minimisation: ∇f(y, *args) = 0, and least squares, whose f is ½‖r‖²."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree

from invlayer_core import _functorch
from invlayer_core.captured import graph_leaves
from invlayer_core.errors import ConditionsError

__all__ = ["HalfSquares", "StationarityConditions", "gradient", "gradient_with_aux"]


def gradient(objective: Callable[..., Tensor], y: Tensor, args: tuple[Any, ...]) -> Tensor:
    """∇ of ``objective(y, *args)`` ``(*batch,)`` with respect to y ``(*batch, n)``, differentiable.

    Samples are independent, so that the gradient of the sum over the batch is that of every sample.
    """
    return gradient_with_aux(lambda point, *args: (objective(point, *args), ()), objective, y, args)[0]


def gradient_with_aux(
    function: Callable[..., tuple[Tensor, Any]], named: Callable[..., Any], y: Tensor, args: tuple[Any, ...]
) -> tuple[Tensor, Any]:
    """The same for a function that returns ``(value, aux)``; ``named`` is what messages call it."""

    def total(point: Tensor) -> tuple[Tensor, Any]:
        value, aux = function(point, *args)
        return _checked(value, named, point).sum(), aux

    return _pulled_back(total, y, by_itself=False)


def _pulled_back(
    function: Callable[[Tensor], tuple[Tensor, Any]], y: Tensor, *, by_itself: bool
) -> tuple[Tensor, Any]:
    """∇ of a number, or of ½‖·‖² of a vector: Jᵀ1, or Jᵀr, which is r pulled back ``by_itself``."""
    if _functorch.is_active():
        taken: Any = torch.func.vjp(function, y, has_aux=True)
        value, pull, aux = taken
        return pull(value if by_itself else torch.ones_like(value))[0], aux
    with_tangent = _functorch.has_tangent(y)
    recorded = torch.is_grad_enabled() or with_tangent
    with torch.enable_grad():
        point = y.view_as(y) if y.requires_grad or with_tangent else y.detach()
        point = point if point.requires_grad else point.requires_grad_()
        value, aux = function(point)
        if not value.requires_grad:
            return torch.zeros_like(y), aux
        if recorded and point.is_leaf:  # y has no gradient: record only if something else has
            recorded = with_tangent or any(leaf is not point for leaf in graph_leaves(value))
        (slope,) = torch.autograd.grad(
            value, point, value if by_itself else None, create_graph=recorded, materialize_grads=True
        )
    return slope, aux if recorded else _pytree.tree_map_only(Tensor, Tensor.detach, aux)


def _checked(value: Any, objective: Callable[..., Any], y: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != y.shape[:-1] or not value.is_floating_point():
        came = f"shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else ""
        objective = getattr(objective, "function", objective)
        raise ConditionsError(
            f"objective {getattr(objective, '__qualname__', type(objective).__name__)!r} returned "
            f"{came or type(value).__name__} for y of shape {tuple(y.shape)}; accepted is one real number "
            f"per sample, of shape {tuple(y.shape[:-1])}. Sum over the event dims, not over the batch: "
            "(...).sum(-1)."
        )
    return value


@final
@dataclass(frozen=True)
class HalfSquares:
    """½‖r(y, *args)‖² of residuals ``(*batch, m)``; with ∂r/∂y ``(*batch, m, n)`` if the user gave it."""

    residuals: Callable[..., Tensor]
    jacobian: Callable[..., Tensor] | None = None

    @property
    def function(self) -> Any:
        """The user's own function."""
        return getattr(self.residuals, "function", self.residuals)

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        return 0.5 * self._checked(y, args).square().flatten(y.ndim - 1).sum(-1)

    def gradient(self, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Jᵀr, differentiable, with nothing on the tape but r and its pullback."""
        return _pulled_back(lambda point: (self._checked(point, args), ()), y, by_itself=True)[0]

    def _checked(self, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        value = self.residuals(y, *args)
        batch = y.shape[:-1]
        if not isinstance(value, Tensor) or value.shape[: len(batch)] != batch or value.ndim == len(batch):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            raise ConditionsError(
                f"residuals {name!r} returned {came} for y of shape {tuple(y.shape)}; accepted is a tensor "
                f"with one system's residuals behind the batch dims, {(*batch, 'm')}."
            )
        return value


@final
@dataclass(frozen=True)
class StationarityConditions:
    """F(y, *args) = ∇f(y, *args): zero where f is least."""

    objective: Callable[..., Tensor]

    @property
    def function(self) -> Any:
        """The user's own function, for messages and for what it captures."""
        return getattr(self.objective, "function", self.objective)

    @property
    def is_squares(self) -> bool:
        """Whether f is ½‖r‖², so that F = Jᵀr."""
        return isinstance(self.objective, HalfSquares)

    @property
    def parts(self) -> Mapping[str, Callable[..., Tensor]]:
        """What a solver of such problems may ask for, beside F."""
        parts: dict[str, Callable[..., Tensor]] = {"objective": self.objective}
        if isinstance(self.objective, HalfSquares):
            parts["residuals"] = self.objective.residuals
            if self.objective.jacobian is not None:
                parts["residuals_jacobian"] = self.objective.jacobian
        return parts

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        if isinstance(self.objective, HalfSquares):
            return self.objective.gradient(y, args)
        return gradient(self.objective, y, args)
