"""Per-sample blocks of a Jacobian from one batched reverse pass, and the test that they are blocks.

For a whole-tensor function of independent samples, ∂r_b/∂y_c = 0 for b ≠ c. Pulling the cotangent
e_i (the same unit vector for every sample) back through r then gives row i of *every* block at once:
n vector-Jacobian products instead of B·n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError, PerformanceWarning, warn_user

__all__ = [
    "batched_rows",
    "check_chunk_size",
    "check_independent",
    "cotangent_basis",
    "coupled_error",
    "full_jacobian_blocks",
    "probe_weights",
    "rows_at_once",
    "to_blocks",
]


def cotangent_basis(residual_shape: Size, batch: Size, like: Tensor) -> Tensor:
    """The m unit cotangents of one system, repeated over the batch: ``(m, *residual_shape)``."""
    event = residual_shape[len(batch) :]
    m = event.numel()
    unit = torch.eye(m, dtype=like.dtype, device=like.device)
    if m == residual_shape.numel():  # one system
        return unit.reshape(m, *residual_shape)
    return unit.reshape(m, *(1 for _ in batch), *event).expand(m, *residual_shape)


def probe_weights(batch: Size, equations: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of one generic cotangent s_b q_i: ``s`` ``(B,)`` over samples, ``q`` ``(m,)`` over equations.

    Fixed, so that no random state is touched; square roots of consecutive integers, modulo 1, are
    equidistributed and show no pattern that a function could be blind to.
    """
    steps = torch.arange(1, batch.numel() + equations + 1, dtype=like.dtype, device=like.device)
    weights = (steps.sqrt() * 7.0).frac() + 0.5
    return weights[: batch.numel()], weights[batch.numel() :]


_CHUNK_BYTES = 2**20  # more do not stay in the caches of a processor, and pages of memory are fetched anew
_CHUNK_BYTES_ON_DEVICE = 2**28  # where small passes cost as much as large ones


def check_chunk_size(called: str, chunk_size: Any) -> None:
    """Refuse what is neither None nor an integer >= 1.

    Raises
    ------
    ConditionsError
        Naming what came.
    """
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ConditionsError(
            f"{called}(chunk_size={chunk_size!r}): accepted is an integer >= 1, the number of rows of the "
            "Jacobian that are taken in one pass, or None."
        )


def rows_at_once(value: Tensor, chunk_size: int | None = None) -> int:
    """How many cotangents of ``value`` are pulled back in one pass: ``chunk_size``, or what is quick."""
    if chunk_size is not None:
        return chunk_size
    most = _CHUNK_BYTES if value.device.type == "cpu" else _CHUNK_BYTES_ON_DEVICE
    return max(1, most // max(1, value.numel() * value.element_size()))


def batched_rows(
    value: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, create_graph: bool
) -> tuple[Tensor, ...]:
    """Pull ``cotangents`` ``(k, *value)`` back to every input, in one batched pass: ``(k, *input)`` each.

    One pass each is needed where the result is to be differentiated again and the graph holds a
    ``Function`` written in Python: its backward, mapped as by ``is_grads_batched``, may then lose its own
    graph without a word.
    """
    k = cotangents.shape[0]
    if not value.requires_grad or k == 0:
        return tuple(tensor.new_zeros(k, *tensor.shape) for tensor in inputs)
    if k == 1 or (create_graph and _has_python_functions(value, inputs)):
        return _looped_rows(value, inputs, cotangents, create_graph)
    try:
        rows = _functorch.gradients_in_batch(value, inputs, cotangents, create_graph)
    except RuntimeError as error:
        looped = _looped_rows(value, inputs, cotangents, create_graph)
        warn_user(_ROW_BY_ROW.format(count=k, error=error), PerformanceWarning)
        return looped
    return tuple(
        tensor.new_zeros(k, *tensor.shape) if row is None else row
        for row, tensor in zip(rows, inputs, strict=True)
    )


def _has_python_functions(value: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph from ``inputs`` to ``value`` holds a custom ``autograd.Function``."""
    python_node: Any = torch.autograd.function.BackwardCFunction
    seen: set[Any] = {tensor.grad_fn for tensor in inputs}
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, python_node):
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False


_ROW_BY_ROW = (
    "The Jacobian was taken row by row ({count} passes instead of one), because the conditions cannot be "
    "differentiated in a batch: {error}. The numbers are the same. Give such a function a vmap rule "
    "(generate_vmap_rule = True), or pass jacobian=, to be fast again."
)


def _looped_rows(
    value: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, create_graph: bool
) -> tuple[Tensor, ...]:
    outputs, kept = (value,), tuple(inputs)
    passes = [
        _functorch.gradients(outputs, kept, (cotangent,), create_graph) for cotangent in cotangents.unbind()
    ]
    by_input = zip(kept, zip(*passes, strict=True), strict=True)
    return tuple(
        torch.stack([torch.zeros_like(tensor) if row is None else row for row in rows])
        for tensor, rows in by_input
    )


def to_blocks(rows: Tensor, batch: Size, size: int) -> Tensor:
    """Rows ``(m, *batch, *event)`` as blocks ``(B, m, n)``."""
    return rows.reshape(rows.shape[0], batch.numel(), size).transpose(0, 1)


def check_independent(rows: Tensor, samples: Tensor, equations: Tensor, pulled: Tensor) -> Tensor:
    """Whether the rows explain a generic pullback: a boolean scalar, True if the batch is *coupled*.

    Row i holds Σ_c ∂r_ci/∂y_b for every b. If samples do not mix, only c = b contributes, and the
    cotangent s_c q_i pulls back to s_b Σ_i q_i row_i. If they do, Σ_c (s_c − s_b) Σ_i q_i ∂r_ci/∂y_b
    remains.

    Parameters
    ----------
    rows : Tensor of shape ``(m, B, n)``
    samples, equations : Tensor
        s and q of :func:`probe_weights`.
    pulled : Tensor of shape ``(B, n)``
        The cotangent s_b q_i pulled back through the whole batch.
    """
    m, count, n = rows.shape
    expected = (equations @ rows.reshape(m, count * n)).reshape(count, n) * samples.unsqueeze(-1)
    tolerance = 1e3 * torch.finfo(rows.dtype).eps * m
    gap = (pulled - expected).abs().amax()
    return gap > tolerance * (expected.abs().amax() + pulled.abs().amax())


def coupled_error(batch: Size, event_dims: int) -> ConditionsError:
    """The error for conditions that mix samples."""
    return ConditionsError(
        f"the conditions mix the samples of the batch {tuple(batch)} (as BatchNorm does in train mode): "
        "sample i's residual depends on sample j's unknowns, so there are no per-sample Jacobians. Accepted "
        "are conditions that treat every sample alone. Put such a module in eval mode, or treat the whole "
        f"batch as one system with event_dims={event_dims + len(batch)}."
    )


def full_jacobian_blocks(
    rows_of: Callable[[Tensor], Tensor], value: Tensor, batch: Size, size: int, step: int
) -> Tensor:
    """The diagonal blocks ``(B, m, n)`` of the whole ``(B, m, B, n)`` Jacobian, ``step`` rows at a time."""
    count, equations = batch.numel(), value.shape[len(batch) :].numel()
    every = torch.arange(value.numel(), device=value.device)
    parts = []
    for rows in every.split(step):
        unit = (rows.unsqueeze(-1) == every).to(value.dtype)
        pulled = rows_of(unit.reshape(len(rows), *value.shape)).reshape(len(rows), count, size)
        own = rows.div(max(1, equations), rounding_mode="floor")  # whose equation a row is
        parts.append(pulled[every[: len(rows)], own])
    return torch.cat(parts).reshape(count, equations, size)
