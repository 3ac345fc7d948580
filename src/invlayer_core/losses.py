"""Robust losses: what a residual costs that may be an outlier.

A loss is ρ(s) of a squared residual s: about s where the residual is small beside the scale c, and less far
out. Least squares with a loss minimises ½ Σ ρ(rᵢ²). That is least squares still, of r̃ = r √(ρ(r²)/r²), which
is a smooth function of r, so that every least-squares solver takes it as it is; and since the objective is
the very one, so are its Hessian and the derivative of its minimum. Nothing is reweighted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree

from invlayer_core.errors import ConditionsError
from invlayer_core.leaves import flatten_up_to
from invlayer_core.smooth import SmoothAtZero

__all__ = ["Cauchy", "GemanMcClure", "Huber", "Loss", "Robust", "SoftL1", "Welsch"]


@dataclass(frozen=True)
class Loss(ABC):
    """ρ(s) = c² ρ̂(s / c²).

    Parameters
    ----------
    scale : float or Tensor
        c, above 0: from which size on a residual counts as an outlier. A tensor broadcasts to the squared
        residuals, and gets its gradient.
    event_dims : int
        How many of the last dims of a residual tensor are one residual, whose squared length is s. With 0
        each number is one.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> data = torch.tensor([1.0, 1.2, 0.8, 50.0], dtype=torch.float64, requires_grad=True)
    >>> y = inv.least_squares(
    ...     lambda y, data: y - data, torch.zeros(1, dtype=torch.float64), data, loss=inv.losses.Huber(0.5)
    ... )
    >>> (gradient,) = torch.autograd.grad(y, data)
    >>> (3 * gradient).round(decimals=6).abs()  # the outlier has no say
    tensor([1., 1., 1., 0.], dtype=torch.float64)
    """

    scale: float | Tensor = 1.0
    event_dims: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Tensor) and not 0 < self.scale < math.inf:
            raise ConditionsError(
                f"{type(self).__name__}(scale={self.scale!r}): accepted is a number above 0, or a tensor."
            )
        if not isinstance(self.event_dims, int) or self.event_dims < 0:
            raise ConditionsError(
                f"{type(self).__name__}(event_dims={self.event_dims!r}): accepted is an integer >= 0."
            )

    @abstractmethod
    def ratio(self, u: Tensor) -> Tensor:
        """ρ̂(u) / u, positive and smooth from u = 0 on."""

    def __call__(self, squared: Tensor) -> Tensor:
        """ρ(s) of squared residuals, in their shape: for objectives that are written as sums."""
        return squared * self.ratio(squared / self._squared_scale())

    def weight(self, squared: Tensor) -> Tensor:
        """ρ′(s): how much of a squared residual still counts, from 1 down to 0."""
        with torch.enable_grad():
            s = squared.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(s).sum(), s)
        return slope

    def residual(self, residual: Tensor) -> Tensor:
        """r̃, in the shape of r, whose squares sum up to ρ."""
        dims = tuple(range(-self.event_dims, 0))
        squared = residual.square()
        squared = squared.sum(dims, keepdim=True) if dims else squared
        return residual * self.ratio(squared / self._squared_scale()).sqrt()

    def _squared_scale(self) -> float | Tensor:
        return self.scale**2


@final
class Huber(Loss):
    """ρ̂(u) = u up to 1, then 2√u − 1: squares near, lengths far.

    Its second derivative jumps at 1, so that the derivative of a minimum is one-sided where a residual sits
    there. Huber, Robust estimation of a location parameter, Ann. Math. Statist. 35 (1964).
    """

    def ratio(self, u: Tensor) -> Tensor:
        far = u > 1
        safe = torch.where(far, u, 1.0)
        return torch.where(far, (2 * safe.sqrt() - 1) / safe, 1.0)


@final
class SoftL1(Loss):
    """ρ̂(u) = 2 (√(1 + u) − 1): Huber's loss without its corner (pseudo-Huber, Charbonnier)."""

    def ratio(self, u: Tensor) -> Tensor:
        return 2 / (1 + (1 + u).sqrt())


_logarithm = SmoothAtZero(
    tuple((-1) ** k / (k + 1) for k in range(18)), lambda u: torch.log1p(u) / u, near=0.1
)
_exponential = SmoothAtZero(
    tuple((-1) ** k / math.factorial(k + 1) for k in range(16)), lambda u: -torch.expm1(-u) / u
)


@final
class Cauchy(Loss):
    """ρ̂(u) = log(1 + u): what a residual of Cauchy distribution costs."""

    def ratio(self, u: Tensor) -> Tensor:
        return _logarithm(u)


@final
class Welsch(Loss):
    """ρ̂(u) = 1 − exp(−u): an outlier costs c² and pulls at nothing.

    Not convex: where a solver ends depends on where it starts. Dennis & Welsch, Techniques for nonlinear
    least squares and robust regression, Comm. Statist. B 7 (1978).
    """

    def ratio(self, u: Tensor) -> Tensor:
        return _exponential(u)


@final
class GemanMcClure(Loss):
    """ρ̂(u) = u / (1 + u): as Welsch, with a longer tail. Geman & McClure, Bull. ISI 52 (1987)."""

    def ratio(self, u: Tensor) -> Tensor:
        return 1 / (1 + u)


@final
@dataclass(frozen=True)
class Robust:
    """The residuals ``(y, *args)`` with a loss, or one for each part of them (None for plain squares)."""

    function: Callable[..., Any]
    loss: Any

    def __post_init__(self) -> None:
        for loss in _pytree.tree_leaves(self.loss):
            if loss is not None and not isinstance(loss, Loss):
                what = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
                raise ConditionsError(
                    f"least_squares(loss=...) has {what}; accepted is an instance from inv.losses, such as "
                    "Huber(1.0), or a pytree of them (and None) like the residuals."
                )

    def __call__(self, y: Any, *args: Any) -> Any:
        value = self.function(y, *args)
        losses, spec = _pytree.tree_flatten(self.loss)
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        parts = flatten_up_to(spec, f"residuals {name!r}", value, "loss")
        return _pytree.tree_unflatten(list(map(_robust, losses, parts)), spec)


def _robust(loss: Loss | None, part: Any) -> Any:
    if loss is None:
        return part
    return _pytree.tree_map_only(Tensor, loss.residual, part)
