"""A guard around derivatives that are no derivatives of anything: a second one raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import UnsupportedTransformError

__all__ = ["first_order_only", "refuse_nested_forward_mode", "without_second_derivative"]


def first_order_only(theta: Sequence[Tensor], called: str) -> tuple[Tensor, ...]:
    """θ again, through which one derivative passes and a derivative of that one raises.

    Raises
    ------
    UnsupportedTransformError
        In nested forward mode at once; elsewhere when the second derivative is taken.
    """
    refuse_nested_forward_mode(called)
    return tuple(
        _functorch.apply(_Once, tensor, called)
        if tensor.is_floating_point() or tensor.is_complex()
        else tensor
        for tensor in theta
    )


def without_second_derivative(derivative: Tensor, point: Tensor, called: str) -> Tensor:
    """A first derivative at ``point``, by which it may be asked for another, and then raises."""
    result: Tensor = _functorch.apply(_Never, derivative, point, called)
    return result


def refuse_nested_forward_mode(called: str) -> None:
    """Raise under jacfwd of jacfwd, where torch would not call the guard."""
    if _functorch.forward_mode_depth() >= 2:
        _refuse(called)


def _refuse(called: str) -> NoReturn:
    raise UnsupportedTransformError(
        f"a second derivative through adjoint={called}: its first one is approximate, so that derivatives of "
        "it are not those of the solution. Accepted is one derivative; for those of higher order take "
        "adjoint=Implicit()."
    )


@final
@_functorch.with_cached_signature
class _Once(torch.autograd.Function):
    """The identity, whose derivative has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, called: str) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensor, ctx.called = inputs
        ctx.save_for_backward(tensor)
        ctx.save_for_forward(tensor)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return _functorch.apply(_Never, cotangent, *_functorch.revive(ctx.saved_tensors), ctx.called), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        result: Tensor = _functorch.apply(_Never, tangent, *_functorch.revive(ctx.saved_tensors), ctx.called)
        return result


@final
@_functorch.with_cached_signature
class _Never(torch.autograd.Function):
    """A first derivative as it is, which depends on ``point``: whoever differentiates it comes by here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, point: Tensor, called: str) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.called = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> NoReturn:
        _refuse(ctx.called)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse(ctx.called)
