"""The autograd node of a CasADi Function: its derivatives are CasADi Functions, run by the same node.

A torch tape through the translated instructions would differentiate ``where(x > 0, sqrt(x), 0)`` to NaN at
x = 0, where CasADi's derivative is 0. So no tape is made: the rule of a Function is the Function that CasADi
derives from it, whose rule is CasADi's next one, and derivatives of every order are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from invlayer_casadi.expressions.expression import Expression
from invlayer_core import UnsupportedTransformError, _functorch

__all__ = ["apply_expression"]


def apply_expression(expression: Expression, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``(*batch, nnz)`` of every input, all with the same batch dims and dtype, to that of every output.

    Raises
    ------
    UnsupportedTransformError
        In nested forward mode (``jacfwd`` of ``jacfwd``).
    """
    if _functorch.forward_mode_depth() >= 2:
        raise UnsupportedTransformError(
            f"CasadiFunction {expression.function.name()!r} in nested forward mode (jacfwd of jacfwd): torch "
            "runs the rule of a custom Function with forward mode switched off, which would give zeros "
            "without a word. Accepted is reverse mode on one side: jacfwd of jacrev, or jacrev of jacfwd."
        )
    results: tuple[Tensor, ...] = _functorch.apply(_Evaluation, expression, *inputs)
    return results


@final
@_functorch.with_cached_signature
class _Evaluation(torch.autograd.Function):
    """Nonzeros in, nonzeros out."""

    @staticmethod
    def forward(expression: Expression, *inputs: Tensor) -> tuple[Tensor, ...]:
        levels: tuple[int, ...] = ()
        for tensor in inputs:
            levels = levels or _functorch.levels_mapped_by_autograd(tensor)
        if levels:
            return _evaluate_mapped(expression, inputs, levels)
        return _evaluate(expression, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        expression, *given = inputs
        ctx.expression, ctx.count = expression, len(given)
        ctx.save_for_backward(*given, *output)
        ctx.save_for_forward(*given, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = _functorch.revive(ctx.saved_tensors)
        given, output = saved[: ctx.count], saved[ctx.count :]
        wanted = tuple(ctx.needs_input_grad[1:])
        rule = ctx.expression.reverse(wanted)
        pulled = iter(apply_expression(rule, _fitted(rule, [*given, *output, *cotangents])))
        function = ctx.expression.function
        results: list[Tensor | None] = [None]
        for i, want in enumerate(wanted):
            if not want:
                results.append(None)
                continue
            place = sum(wanted[:i])
            sparsities = rule.function.sparsity_out(place), function.sparsity_in(i)
            results.append(_projected(next(pulled), *sparsities))
        return tuple(results)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved = _functorch.revive(ctx.saved_tensors)
        given, output = saved[: ctx.count], saved[ctx.count :]
        moved = [torch.zeros_like(g) if t is None else t for g, t in zip(given, tangents, strict=True)]
        rule = ctx.expression.forward()
        pushed = apply_expression(rule, _fitted(rule, [*given, *output, *moved]))
        function = ctx.expression.function
        return tuple(
            _projected(tensor, rule.function.sparsity_out(i), function.sparsity_out(i))
            for i, tensor in enumerate(pushed)
        )

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], expression: Expression, *inputs: Tensor) -> Any:
        pairs = zip(inputs, in_dims[1:], strict=True)
        moved = [_functorch.mapped_first(tensor, dim, info.batch_size) for tensor, dim in pairs]
        return apply_expression(expression, moved), (0,) * expression.function.n_out()


def _evaluate(expression: Expression, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    lead = inputs[0].shape[:-1] if inputs else torch.Size(())
    flat = [tensor.detach().reshape(lead.numel(), tensor.shape[-1]) for tensor in inputs]
    return tuple(result.reshape(*lead, result.shape[-1]) for result in expression.evaluate(flat))


def _evaluate_mapped(
    expression: Expression, inputs: Sequence[Tensor], levels: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Under ``autograd.grad(..., is_grads_batched=True)``: the mapped dimension is one more batch dim."""
    mapped = [_functorch.is_mapped_by_autograd(tensor) for tensor in inputs]
    plain = [_functorch.plain(tensor) for tensor in inputs]
    size = plain[mapped.index(True)].shape[0]
    spread = [t if m else t.expand(size, *t.shape) for t, m in zip(plain, mapped, strict=True)]
    return tuple(_functorch.map_again(result, levels) for result in _evaluate(expression, spread))


def _fitted(rule: Expression, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a derivative Function takes: it asks for nothing of the outputs that it does not read."""
    sizes = [rule.function.nnz_in(i) for i in range(rule.function.n_in())]
    return [t if t.shape[-1] == size else t[..., :size] for t, size in zip(tensors, sizes, strict=True)]


def _projected(nonzeros: Tensor, given: Any, wanted: Any) -> Tensor:
    """Nonzeros on one pattern as nonzeros on a larger one."""
    if given.nnz() == wanted.nnz():
        return nonzeros
    of = {place: k for k, place in enumerate(zip(*given.get_triplet(), strict=True))}
    sources = [of.get(place, given.nnz()) for place in zip(*wanted.get_triplet(), strict=True)]
    padded = torch.cat([nonzeros, nonzeros.new_zeros(*nonzeros.shape[:-1], 1)], dim=-1)
    return padded.index_select(-1, torch.tensor(sources, device=nonzeros.device))
