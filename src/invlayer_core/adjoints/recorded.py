"""The value of one tensor with the derivative of another, which autograd has recorded."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError

__all__ = ["answer_for_failed", "with_derivative_of"]


def answer_for_failed(rhs: Tensor, value: float) -> Tensor:
    """``value`` for a failed sample, or zero where nothing is asked of it."""
    return torch.where(rhs == 0, torch.zeros_like(rhs), torch.full_like(rhs, value))


def with_derivative_of(
    recorded: Tensor, y: Tensor, dead: Tensor | None = None, dead_value: float = torch.nan
) -> Tensor:
    """``y`` with the derivative of ``recorded``; failed samples answer ``dead_value``.

    Parameters
    ----------
    recorded, y : Tensor of shape ``(*batch, *event)``
    dead : Tensor of shape ``(*batch,)`` or None
    dead_value : float
    """
    if _functorch.forward_mode_depth() >= 2:  # where torch does not differentiate a custom jvp rule again
        if dead is not None:
            raise ConditionsError(
                "nested forward mode (jacfwd of jacfwd) over a batch with failed samples is not defined; "
                "accepted is on_failure='raise', or reverse mode on the outside (jacfwd of jacrev)."
            )
        return y + (recorded - recorded.detach())
    mask = None if dead is None else dead.reshape(*dead.shape, *(1 for _ in range(y.ndim - dead.ndim)))
    result: Tensor = _functorch.apply(_DerivativeOf, recorded, y.detach(), mask, dead_value)
    return result


@final
@_functorch.with_cached_signature
class _DerivativeOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(recorded: Tensor, y: Tensor, dead: Tensor | None, dead_value: float) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, dead, ctx.dead_value = inputs
        ctx.save_for_backward(dead)
        ctx.save_for_forward(dead)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _DerivativeOf._answer(ctx, cotangent), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _DerivativeOf._answer(ctx, tangent)

    @staticmethod
    def _answer(ctx: Any, direction: Tensor) -> Tensor:
        (dead,) = _functorch.revive(ctx.saved_tensors)
        if dead is None:
            return direction.clone()
        return torch.where(dead, answer_for_failed(direction, ctx.dead_value), direction)
