"""The two operators that stand in a traced graph: the solve, and its pullback.

Both are opaque to torch (``torch.library.custom_op``) and run the ordinary engine. Their operands are a
layer's key, the structure of its args, and one flat list of tensors.

An operator has first derivatives in reverse mode, and no others. Elsewhere torch would take a wrong one without
a word: ``torch.func.jvp`` through a custom operator is zero. So a kernel of its own refuses every ``torch.func``
transform, an open level of forward mode is refused, and so is a second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.certificate import SolveInfo
from invlayer_core.compiled.registry import find
from invlayer_core.errors import ConditionsError, UnsupportedTransformError
from invlayer_core.implicit import OnFailure
from invlayer_core.solvers.contract import Status
from invlayer_core.structure import SystemShape

__all__ = ["NotInGraphError", "pullback", "solve"]


class NotInGraphError(UnsupportedTransformError, NotImplementedError):
    """A transform met an operator. (Dynamo takes a ``NotImplementedError`` for a reason to break the graph.)"""


@torch.library.custom_op("invlayer::solve", mutates_args=())
def solve(layer: str, args: str, differentiable: bool, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """y*, and which samples have no derivative of their own.

    Parameters
    ----------
    layer : str
        Its key.
    args : str
        The structure of its args; see :mod:`~invlayer_core.compiled.template`.
    differentiable : bool
        Whether gradients were enabled where the call was traced.
    tensors : list of Tensor
        The guess if there is one, the tensors of the args, the parameters of the conditions.
    """
    _refuse_forward_mode()
    problem = find(layer).traced_problem()
    call = problem.call(args)
    # Below autograd: nothing is recorded, unless F captures tensors that nobody passed.
    with _functorch.above_autograd(), torch.set_grad_enabled(differentiable):
        y, info = problem.solve(call, [tensor.detach() for tensor in tensors])
    if y.requires_grad:
        raise _captured_error()
    _check_shape(y, find(layer).fake_solution(*_fake_operands(problem.guesses, call.args, tensors)))
    return y.detach().clone(), _dead(info, problem.settings.on_failure).to(y.device)


@solve.register_fake
def _(layer: str, args: str, differentiable: bool, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    owner = find(layer)
    problem = owner.traced_problem()
    y = owner.fake_solution(*_fake_operands(problem.guesses, problem.call(args).args, tensors))
    batch = SystemShape.of(y, problem.settings.event_dims).batch
    return y.new_empty(y.shape), y.new_empty(batch, dtype=torch.bool)


def _fake_operands(guesses: int, args: Any, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return (*tensors[:guesses], *args(tensors[guesses:]))


@torch.library.custom_op("invlayer::pullback", mutates_args=())
def pullback(
    layer: str,
    args: str,
    y: Tensor,
    dead: Tensor,
    cotangent: Tensor,
    tensors: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    """The cotangents of those of ``tensors`` that are wanted."""
    problem = find(layer).traced_problem()
    with _functorch.above_autograd(), torch.enable_grad():
        mask = dead if bool(dead.any()) else None
        pulled = problem.pull_back(problem.call(args), y, mask, cotangent, tensors, wanted)
    return [tensor.detach().clone() for tensor in pulled]


@pullback.register_fake
def _(
    layer: str,
    args: str,
    y: Tensor,
    dead: Tensor,
    cotangent: Tensor,
    tensors: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(t) for t, want in zip(tensors, wanted, strict=True) if want]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.layer, ctx.args, _, tensors = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[None, None, None, list[Tensor | None]]:
    y, dead, *tensors = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[3])
    supply = iter(torch.ops.invlayer.pullback(ctx.layer, ctx.args, y, dead, cotangent, tensors, wanted))
    return None, None, None, [next(supply) if want else None for want in wanted]


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise UnsupportedTransformError(
        "a layer inside torch.compile or torch.export was differentiated twice; its operator has first "
        "derivatives only. Accepted for higher orders is the layer outside of torch.compile: mark the function "
        "that calls it with torch.compiler.disable."
    )


solve.register_autograd(_backward, setup_context=_save)
pullback.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _refuse_transform(*_: Any, **__: Any) -> None:
    raise NotInGraphError(
        "a torch.func transform (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap) met a layer inside torch.compile "
        "or torch.export; there torch would return zeros for some of them. Accepted is the layer outside of "
        "torch.compile: mark the function that calls it with torch.compiler.disable, or transform the layer itself."
    )


_refusals = torch.library.Library("invlayer", "IMPL")
for _operator in ("solve", "pullback"):
    _refusals.impl(_operator, _refuse_transform, "FuncTorchDynamicLayerFrontMode")


def _refuse_forward_mode() -> None:
    if _functorch.in_forward_mode():
        raise NotInGraphError(
            "a compiled or exported layer was called inside torch.autograd.forward_ad.dual_level(), and a "
            "tangent would be lost there. Accepted is reverse mode, or the layer outside of torch.compile."
        )


def _captured_error() -> ConditionsError:
    return ConditionsError(
        "the conditions of a layer inside torch.compile or torch.export depend on a tensor that requires grad "
        "and is neither in args nor a parameter of an nn.Module that is the conditions: its gradient would be "
        "lost. Pass it in args=(...), or make the conditions an nn.Module (or a method of one) and the tensor "
        "its parameter."
    )


def _check_shape(y: Tensor, expected: Tensor) -> None:
    if (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device):
        return
    raise ConditionsError(
        f"inside torch.compile or torch.export the solver returned y of shape {tuple(y.shape)}, {y.dtype}, on "
        f"{y.device}; the graph was traced for shape {tuple(expected.shape)}, {expected.dtype}, on "
        f"{expected.device}. Accepted is what was promised: the form of x for inverse, of y0 for root and "
        "fixed_point, and for implicit_function that of register_fake."
    )


def _dead(info: SolveInfo, on_failure: OnFailure) -> Tensor:
    """Which samples have no derivative of their own, as in the spine."""
    if on_failure != "warn":
        return ~info.ok
    lost = [int(status) >= int(Status.NOT_FINITE) for status in info.status]
    return ~info.ok & torch.tensor(lost, dtype=torch.bool, device=info.ok.device).reshape(info.ok.shape)
