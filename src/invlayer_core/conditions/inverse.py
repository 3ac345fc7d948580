"""Inverse functions: f(g(x)) = x, so that y = g(x) satisfies f(y) − x = 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError, UnsupportedTransformError
from invlayer_core.inputs import is_real_tensor
from invlayer_core.structured import subtract

__all__ = ["ConstantJacobian", "DeclaredJacobianConditions", "InverseConditions"]


@final
@dataclass(frozen=True)
class InverseConditions:
    """F(y, x) = f(y) − x, leaf by leaf for pytrees."""

    function: Callable[[Any], Any]

    def __call__(self, y: Any, x: Any) -> Any:
        value = self.function(y)
        if isinstance(x, Tensor) and isinstance(value, Tensor):
            return value - x
        return subtract("f", value, x, like="x")


@final
@_functorch.with_cached_signature
class _NoDerivative(torch.autograd.Function):
    """A scalar zero that depends on y, and that refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        raise UnsupportedTransformError(_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        raise UnsupportedTransformError(_SECOND_DERIVATIVE)


_SECOND_DERIVATIVE = (
    "inverse(x, g, jacobian=J) was differentiated twice, but a constant J does not say how it changes "
    "with y. Accepted for higher derivatives are f=f, or jacobian= as a torch function of y."
)


@final
@dataclass(frozen=True)
class ConstantJacobian:
    """A Jacobian known only at y*: the same ``blocks`` of shape ``(*batch, n, n)`` whatever y is."""

    blocks: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        return self.blocks + _functorch.apply(_NoDerivative, y)


@final
@_functorch.with_cached_signature
class _DeclaredInverse(torch.autograd.Function):
    """A function of y with value ``x`` and Jacobian ``jacobian(y)``: what f is near y*."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, jacobian: Callable[[Tensor], Tensor]) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.jacobian = inputs[2]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (y,) = _functorch.revive(ctx.saved_tensors)
        blocks = ctx.jacobian(y)
        return (blocks.mT @ cotangent.reshape(*blocks.shape[:-1], 1)).reshape(y.shape), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (y,) = _functorch.revive(ctx.saved_tensors)
        blocks = ctx.jacobian(y)
        result: Tensor = (blocks @ tangent.reshape(*blocks.shape[:-1], 1)).reshape(y.shape)
        return result


@final
@dataclass(frozen=True)
class DeclaredJacobianConditions:
    """F(y, x) = f(y) − x where f is known only by its Jacobian, ``jacobian(y) -> (*batch, n, n)``."""

    jacobian: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        if not (is_real_tensor(y) and is_real_tensor(x)):
            raise ConditionsError(
                "inverse(x, g, jacobian=...) came with x or y = g(x) a pytree or complex. Accepted there is "
                "one real tensor for each; pass the inverse itself, f=."
            )
        if _functorch.forward_mode_depth() >= 2:
            if isinstance(self.jacobian, ConstantJacobian):
                raise UnsupportedTransformError(_SECOND_DERIVATIVE)
            raise UnsupportedTransformError(
                "inverse(x, g, jacobian=...) under nested forward mode (jacfwd of jacfwd): torch would give "
                "zeros there. Accepted are f=f, or reverse mode on one side (jacfwd of jacrev)."
            )
        value: Tensor = _functorch.apply(_DeclaredInverse, y, x.detach(), self.jacobian)
        return value - x
