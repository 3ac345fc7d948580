"""An objective pushed by a vector: f(y, *args) + ε ⟨v, y⟩, for the solver that minimises f."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.conditions.stationarity import HalfSquares, StationarityConditions

__all__ = ["pushed"]


def pushed(conditions: StationarityConditions, epsilon: float) -> StationarityConditions:
    """The conditions of the pushed objective; its args are those of f, v ``(*batch, n)``, and a centre y*.

    Least squares stay least squares: ½‖ε (y − y*) + v‖² = ε ⟨v, y − y*⟩ + ½ ε² ‖y − y*‖² + const, so that one
    more residual for each unknown does it, but for a term that is of second order in ε. (Theseus puts its own
    around y = 0.)
    """
    objective = conditions.objective
    if isinstance(objective, HalfSquares):
        jacobian = objective.jacobian
        given = None if jacobian is None else _PushedJacobian(jacobian, epsilon)
        return StationarityConditions(HalfSquares(_PushedResiduals(objective.residuals, epsilon), given))
    return StationarityConditions(_PushedObjective(objective, epsilon))


@final
@dataclass(frozen=True)
class _PushedObjective:
    function: Callable[..., Tensor]
    epsilon: float

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        *own, push, centre = args
        return self.function(y, *own) + self.epsilon * (push * (y - centre)).sum(-1)


@final
@dataclass(frozen=True)
class _PushedResiduals:
    function: Callable[..., Tensor]
    epsilon: float

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        *own, push, centre = args
        residuals = self.function(y, *own).flatten(y.ndim - 1)
        return torch.cat([residuals, self.epsilon * (y - centre) + push], -1)


@final
@dataclass(frozen=True)
class _PushedJacobian:
    function: Callable[..., Tensor]
    epsilon: float

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        blocks = self.function(y, *args[:-2])
        identity = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        return torch.cat([blocks, self.epsilon * identity.expand(*blocks.shape[:-2], *identity.shape)], -2)
