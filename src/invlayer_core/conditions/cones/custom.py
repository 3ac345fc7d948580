"""Projections that are found by iteration, as differentiable functions.

The derivative of such a projection is a torch expression in its argument and its *result*. Saving the result
gives it its own node in the graph, so differentiating the expression differentiates the projection in it by
the same rule, to every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import UnsupportedTransformError

if TYPE_CHECKING:
    from invlayer_core.conditions.cones.three import ThreeDimensionalFamily

__all__ = ["project_iteratively", "refuse_nested_forward"]


def refuse_nested_forward(cone: str) -> None:
    """Raise under ``jacfwd(jacfwd(...))``, where torch drops the inner derivative of a custom rule.

    Raises
    ------
    UnsupportedTransformError
        If two or more forward-mode transforms are running.
    """
    if _functorch.forward_mode_depth() >= 2:
        raise UnsupportedTransformError(
            f"nested forward mode (jacfwd of jacfwd) through {cone}: torch would silently give zeros. "
            "Accepted is reverse mode on one side (jacfwd of jacrev)."
        )


def project_iteratively(family: ThreeDimensionalFamily, w: Tensor) -> Tensor:
    """Π_K(w), ``(..., 3)``, differentiable to every order."""
    refuse_nested_forward(f"the {family.name} cone")
    result: Tensor = _functorch.apply(_Projection, family, w)
    return result


@final
@_functorch.with_cached_signature
class _Projection(torch.autograd.Function):
    """w ↦ Π_K(w), with the matrix that the family makes of w and the result as derivative."""

    @staticmethod
    def forward(family: ThreeDimensionalFamily, w: Tensor) -> Tensor:
        return family.find_projection(w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.family, w = inputs
        ctx.save_for_backward(w, output)
        ctx.save_for_forward(w, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        w, s = _functorch.revive(ctx.saved_tensors)
        return None, (ctx.family.matrix(w, s) @ cotangent.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        w, s = _functorch.revive(ctx.saved_tensors)
        return (ctx.family.matrix(w, s) @ tangent.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], family: ThreeDimensionalFamily, w: Tensor) -> Any:
        return _Projection.apply(family, _functorch.mapped_first(w, in_dims[1], info.batch_size)), 0
