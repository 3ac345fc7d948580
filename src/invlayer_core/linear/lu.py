"""Batched LU: one factorisation, any number of right-hand sides, derivatives of every order.

Why not ``torch.linalg.solve``: it raises for the whole batch if one matrix is singular, and its second
derivative synchronises with the GPU. ``lu_factor_ex`` with ``lu_solve`` does neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch

__all__ = ["LUFactors", "lu_factor", "lu_solve"]

# Batched CPU LU is broken in torch from this size on, with two or more threads: n = 150 hangs, larger
# ones return garbage pivots or raise (pytorch issues 141358 and 142815).
_BROKEN_SIZE = 150


@final
class LUFactors(NamedTuple):
    """P L U of every block, and 1 + the index of the first zero pivot (0 if there is none)."""

    factors: Tensor  # (B, n, n)
    pivots: Tensor  # (B, n)
    info: Tensor  # (B,)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_broken_here(blocks: Tensor) -> bool:
    return (
        blocks.device.type == "cpu"
        and blocks.shape[-1] >= _BROKEN_SIZE
        and blocks.shape[:-2].numel() > 1
        and torch.get_num_threads() > 1
    )


@torch.no_grad()
def lu_factor(blocks: Tensor) -> LUFactors:
    """Factorise every block of ``(B, n, n)``; never raises on singular ones.

    Examples
    --------
    >>> lu_factor(torch.diag(torch.tensor([2.0, 0.0]))[None]).info
    tensor([2], dtype=torch.int32)
    """
    if not _is_broken_here(blocks):
        return LUFactors(*torch.linalg.lu_factor_ex(blocks))
    if threading.current_thread() is threading.main_thread():
        with _one_thread():
            return LUFactors(*torch.linalg.lu_factor_ex(blocks))
    # The number of threads is a process-wide setting: a worker thread must not touch it.
    parts = [torch.linalg.lu_factor_ex(block) for block in blocks.reshape(-1, *blocks.shape[-2:])]
    return LUFactors(
        *(torch.stack(part).reshape(*blocks.shape[:-2], *part[0].shape) for part in zip(*parts, strict=True))
    )


@final
@_functorch.with_cached_signature
class _Solve(torch.autograd.Function):
    """x with ``blocks x = rhs`` (or blocksᵀ x = rhs), given the factors of ``blocks``.

    Its derivative is two more solves with the same factors: from A x = b follows A dx = db − dA x, hence
    b̄ = A⁻ᵀ x̄ and Ā = −b̄ xᵀ. Written through ``_Solve`` itself, it holds at every order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks: Tensor, rhs: Tensor, factors: Tensor, pivots: Tensor, transpose: bool) -> Tensor:
        return torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1), adjoint=transpose).squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        blocks, _, factors, pivots, ctx.transpose = inputs
        ctx.save_for_backward(blocks, factors, pivots, output)
        ctx.save_for_forward(blocks, factors, pivots, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        blocks, factors, pivots, x = ctx.saved_tensors
        rhs_bar = _Solve.apply(blocks, cotangent, factors, pivots, not ctx.transpose)
        if not ctx.needs_input_grad[0]:
            return None, rhs_bar, None, None, None
        left, right = (x, rhs_bar) if ctx.transpose else (rhs_bar, x)
        return -left.unsqueeze(-1) * right.unsqueeze(-2), rhs_bar, None, None, None

    @staticmethod
    def jvp(ctx: Any, blocks_dot: Tensor | None, rhs_dot: Tensor | None, *_: None) -> Tensor:
        blocks, factors, pivots, x = ctx.saved_tensors
        rhs = torch.zeros_like(x) if rhs_dot is None else rhs_dot
        if blocks_dot is not None:
            change = blocks_dot.mT if ctx.transpose else blocks_dot
            rhs = rhs - (change @ x.unsqueeze(-1)).squeeze(-1)
        return _Solve.apply(blocks, rhs, factors, pivots, ctx.transpose)


def lu_solve(blocks: Tensor, rhs: Tensor, factors: LUFactors, *, transpose: bool = False) -> Tensor:
    """Solve with every block, differentiably to any order in ``blocks`` and ``rhs``.

    Parameters
    ----------
    blocks : Tensor of shape ``(B, n, n)``
    rhs : Tensor of shape ``(B, n)``
    factors : LUFactors
        Of ``blocks``.
    transpose : bool
        Solve with the transposed blocks.

    Returns
    -------
    Tensor of shape ``(B, n)``
        Infinite or NaN for samples whose block is exactly singular.
    """
    recorded = torch.is_grad_enabled() and (blocks.requires_grad or rhs.requires_grad)
    if not recorded and not _functorch.is_active():
        return _Solve.forward(blocks, rhs, factors.factors, factors.pivots, transpose)
    result: Tensor = _Solve.apply(blocks, rhs, factors.factors, factors.pivots, transpose)
    return result
