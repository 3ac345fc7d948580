"""Functions that another library evaluates and differentiates, as torch functions under every transform.

A custom ``autograd.Function`` meets torch in five ways (backward, forward mode, ``vmap``, mapped cotangents,
values wrapped by transforms), and each has a trap. They are met once, here: an author states values and the
two derivative rules, in terms of further such functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError, UnsupportedTransformError

__all__ = ["ForeignFunction", "in_transform"]


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is running, under which tensors have no values to look at.

    Examples
    --------
    >>> import torch
    >>> in_transform(), torch.func.grad(lambda x: x * in_transform())(torch.tensor(1.0)).item()
    (False, 1.0)
    """
    return _functorch.is_active()


class ForeignFunction(ABC):
    """``(*batch, k)`` tensors in and out, evaluated by another library, with rules that are known.

    As a rule is made of calls of further foreign functions, derivatives of every order are exact, and every
    transform of torch works but nested forward mode.

    Raises
    ------
    ConditionsError
        On a call, if batch dims differ.
    UnsupportedTransformError
        On a call in nested forward mode (``jacfwd`` of ``jacfwd``).

    Examples
    --------
    >>> import numpy as np, torch
    >>> class Exp(ForeignFunction):
    ...     name = "exp"
    ...
    ...     def evaluate(self, inputs):
    ...         return [torch.from_numpy(np.exp(inputs[0].numpy()))]
    ...
    ...     def pull(self, wanted, inputs, outputs, cotangents):
    ...         return [self(*inputs)[0] * cotangents[0]]
    ...
    ...     def push(self, inputs, outputs, tangents):
    ...         return [self(*inputs)[0] * tangents[0]]
    >>> x = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.gradgradcheck(lambda x: Exp()(x)[0], x)
    True
    """

    name: str

    @abstractmethod
    def evaluate(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """``(B, k)`` of every input to ``(B, k)`` of every output; plain tensors, without gradient."""

    @abstractmethod
    def pull(
        self,
        wanted: tuple[bool, ...],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """The cotangents of those inputs that are wanted, differentiable."""

    @abstractmethod
    def push(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The tangents of all outputs, differentiable."""

    @final
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs; inputs have the same batch dims and dtype."""
        if _functorch.forward_mode_depth() >= 2:
            raise UnsupportedTransformError(
                f"{self.name} in nested forward mode (jacfwd of jacfwd): torch runs the rule of a custom "
                "Function with forward mode switched off, which would give zeros without a word. Accepted is "
                "reverse mode on one side: jacfwd of jacrev, or jacrev of jacfwd."
            )
        if any(tensor.shape[:-1] != inputs[0].shape[:-1] for tensor in inputs[1:]):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise ConditionsError(
                f"{self.name} came with inputs of shapes {shapes}; accepted are equal batch dims, which are "
                "all but the last: expand them."
            )
        if _is_plain(inputs):
            return _evaluate(self, inputs)
        results: tuple[Tensor, ...] = _functorch.apply(_Evaluation, self, *inputs)
        return results


@final
@_functorch.with_cached_signature
class _Evaluation(torch.autograd.Function):
    """One call."""

    @staticmethod
    def forward(function: ForeignFunction, *inputs: Tensor) -> tuple[Tensor, ...]:
        levels: tuple[int, ...] = ()
        for tensor in inputs:
            levels = levels or _functorch.levels_mapped_by_autograd(tensor)
        if levels:
            return _evaluate_mapped(function, inputs, levels)
        return _evaluate(function, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *given = inputs
        ctx.count = len(given)
        ctx.save_for_backward(*given, *output)
        ctx.save_for_forward(*given, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = _functorch.revive(ctx.saved_tensors)
        wanted = tuple(ctx.needs_input_grad[1:])
        pulled = iter(ctx.function.pull(wanted, saved[: ctx.count], saved[ctx.count :], cotangents))
        return None, *(next(pulled) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved = _functorch.revive(ctx.saved_tensors)
        given = saved[: ctx.count]
        moved = [torch.zeros_like(g) if t is None else t for g, t in zip(given, tangents, strict=True)]
        return tuple(ctx.function.push(given, saved[ctx.count :], moved))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], function: ForeignFunction, *inputs: Tensor) -> Any:
        pairs = zip(inputs, in_dims[1:], strict=True)
        results = function(*(_functorch.mapped_first(tensor, dim, info.batch_size) for tensor, dim in pairs))
        return results, (0,) * len(results)


def _is_plain(inputs: Sequence[Tensor]) -> bool:
    """Whether no derivative is recorded, pushed or mapped, as in most backward passes."""
    if torch.is_grad_enabled() or _functorch.is_active() or _functorch.in_forward_mode():
        return False
    return not any(map(_functorch.is_mapped_by_autograd, inputs))


def _evaluate(function: ForeignFunction, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    lead = inputs[0].shape[:-1] if inputs else torch.Size(())
    if len(lead) == 1:
        return tuple(function.evaluate([tensor.detach() for tensor in inputs]))
    flat = [tensor.detach().reshape(lead.numel(), tensor.shape[-1]) for tensor in inputs]
    return tuple(result.reshape(*lead, result.shape[-1]) for result in function.evaluate(flat))


def _evaluate_mapped(
    function: ForeignFunction, inputs: Sequence[Tensor], levels: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Under ``autograd.grad(..., is_grads_batched=True)``: the mapped dimension is one more batch dim."""
    mapped = [_functorch.is_mapped_by_autograd(tensor) for tensor in inputs]
    plain = [_functorch.plain(tensor) for tensor in inputs]
    size = plain[mapped.index(True)].shape[0]
    spread = [t if m else t.expand(size, *t.shape) for t, m in zip(plain, mapped, strict=True)]
    return tuple(_functorch.map_again(result, levels) for result in _evaluate(function, spread))
