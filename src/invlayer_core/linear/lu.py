"""Batched LU: one factorisation, any number of right-hand sides, derivatives of every order.

Why not ``torch.linalg.solve``: it raises for the whole batch if one matrix is singular, and its second
derivative synchronises with the GPU. ``lu_factor_ex`` with ``lu_solve`` does neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch

__all__ = ["LUFactors", "has_lost_rank", "lu_factor", "lu_solve", "lu_solve_once", "solve_recorded"]

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
        blocks.shape[-1] >= _BROKEN_SIZE
        and blocks.device.type == "cpu"
        and blocks.shape[:-2].numel() > 1
        and torch.get_num_threads() > 1
    )


def lu_factor(blocks: Tensor) -> LUFactors:
    """Factorise every block of ``(B, n, n)``; never raises on singular ones, and records no gradient.

    Examples
    --------
    >>> lu_factor(torch.diag(torch.tensor([2.0, 0.0]))[None]).info
    tensor([2], dtype=torch.int32)
    """
    blocks = blocks.detach()
    return LUFactors(*_Factor.apply(blocks)) if _functorch.is_active() else _factor(blocks)


def _factor(blocks: Tensor) -> LUFactors:
    if not _is_broken_here(blocks):
        return LUFactors(*torch.linalg.lu_factor_ex(blocks))
    if threading.current_thread() is threading.main_thread():
        with _one_thread():
            return LUFactors(*torch.linalg.lu_factor_ex(blocks))
    # The number of threads is a process-wide setting: a worker thread must not touch it.
    batch, n = blocks.shape[:-2], blocks.shape[-1]
    parts = [torch.linalg.lu_factor_ex(block) for block in blocks.reshape(-1, n, n)]
    factors, pivots, info = (torch.stack(part) for part in zip(*parts, strict=True))
    return LUFactors(factors.reshape(blocks.shape), pivots.reshape(*batch, n), info.reshape(batch))


def has_lost_rank(factors: LUFactors) -> Tensor:
    """Samples ``(B,)`` with a pivot that rounding alone may have made: their block may be singular."""
    pivots = factors.factors.diagonal(dim1=-2, dim2=-1).abs()
    rounding = 10 * pivots.shape[-1] * torch.finfo(pivots.dtype).eps
    return ~(pivots.amin(-1) > rounding * pivots.amax(-1))  # True for NaN


def _mapped_first(tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> list[Tensor]:
    """Every tensor with the mapped dimension in front, where it is one more batch dimension.

    With torch's own rule ``lu_solve`` sees several batch dimensions, and is wrong there; see ``_Solve``.
    """
    return [_functorch.mapped_first(t, dim, size) for t, dim in zip(tensors, dims, strict=True)]


@final
@_functorch.with_cached_signature
class _Factor(torch.autograd.Function):
    """The factorisation as torch.func sees it: without derivative, and with a batching rule of our own."""

    @staticmethod
    def forward(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors, pivots, info = _factor(blocks)
        return factors, pivots, info

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise AssertionError("the factorisation has no derivative; its input is detached")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], blocks: Tensor) -> Any:
        return _Factor.apply(*_mapped_first([blocks], in_dims, info.batch_size)), (0, 0, 0)


@final
@_functorch.with_cached_signature
class _Solve(torch.autograd.Function):
    """x with ``blocks x = rhs`` (or blocksᵀ x = rhs), given the factors of ``blocks``.

    Its derivative is two more solves with the same factors: from A x = b follows A dx = db − dA x, hence
    b̄ = A⁻ᵀ x̄ and Ā = −b̄ xᵀ. Written through ``_Solve`` itself, it holds at every order.
    """

    @staticmethod
    def forward(blocks: Tensor, rhs: Tensor, factors: Tensor, pivots: Tensor, transpose: bool) -> Tensor:
        # With several batch dimensions, lu_solve on the CPU goes by the stride of the innermost one even
        # where its size is 1, and returns wrong numbers (seen in torch 2.13): there they become one.
        if factors.ndim <= 3:
            return torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1), adjoint=transpose).squeeze(-1)
        n = rhs.shape[-1]
        x = torch.linalg.lu_solve(
            factors.reshape(-1, n, n), pivots.reshape(-1, n), rhs.reshape(-1, n, 1), adjoint=transpose
        )
        return x.reshape(rhs.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        blocks, _, factors, pivots, ctx.transpose = inputs
        ctx.save_for_backward(blocks, factors, pivots, output)
        ctx.save_for_forward(blocks, factors, pivots, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        blocks, factors, pivots, x = _functorch.revive(ctx.saved_tensors)
        rhs_bar = _functorch.apply(_Solve, blocks, cotangent, factors, pivots, not ctx.transpose)
        if not ctx.needs_input_grad[0]:
            return None, rhs_bar, None, None, None
        left, right = (x, rhs_bar) if ctx.transpose else (rhs_bar, x)
        return -left.unsqueeze(-1) * right.unsqueeze(-2), rhs_bar, None, None, None

    @staticmethod
    def jvp(ctx: Any, blocks_dot: Tensor | None, rhs_dot: Tensor | None, *_: None) -> Tensor:
        blocks, factors, pivots, x = _functorch.revive(ctx.saved_tensors)
        rhs = torch.zeros_like(x) if rhs_dot is None else rhs_dot
        if blocks_dot is not None:
            change = blocks_dot.mT if ctx.transpose else blocks_dot
            rhs = rhs - (change @ x.unsqueeze(-1)).squeeze(-1)
        return _Solve.apply(blocks, rhs, factors, pivots, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        *tensors, transpose = args
        return _Solve.apply(*_mapped_first(tensors, in_dims[:-1], info.batch_size), transpose), 0


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
    if not (recorded or _functorch.in_forward_mode() or _functorch.is_active()):
        return _Solve.forward(blocks, rhs, factors.factors, factors.pivots, transpose)
    if _functorch.is_mapped_by_autograd(rhs) or _functorch.forward_mode_depth() >= 2:
        # Autograd's own mapping drops the graph inside a custom Function, and nested forward mode its
        # tangents, both without a word.
        return solve_recorded(blocks.mT if transpose else blocks, rhs)
    result: Tensor = _functorch.apply(_Solve, blocks, rhs, factors.factors, factors.pivots, transpose)
    return result


def lu_solve_once(blocks: Tensor, rhs: Tensor) -> Tensor:
    """``blocks⁻¹ rhs`` where nothing is recorded, mapped or pushed: no more than the two operations."""
    factors, pivots, _ = _factor(blocks)
    return torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1)).squeeze(-1)


def solve_recorded(blocks: Tensor, rhs: Tensor) -> Tensor:
    """``blocks⁻¹ rhs`` in operations that torch differentiates and maps by itself, at any depth.

    (``torch.linalg.solve`` is wrong under jacrev of jacfwd, and ``lu_solve`` with several batch dimensions:
    seen in torch 2.13.)
    """
    if blocks.device.type == "cpu" and blocks.shape[-1] >= _BROKEN_SIZE and torch.get_num_threads() > 1:
        # QR where batched LU may be broken: mapped dimensions do not show, and autograd may come back to this
        # in any thread, so that neither the batch nor the number of threads can be relied on.
        q, r = torch.linalg.qr(blocks)
        return torch.linalg.solve_triangular(r, q.mT @ rhs.unsqueeze(-1), upper=True).squeeze(-1)
    permutation, lower, upper = torch.lu_unpack(*torch.linalg.lu_factor_ex(blocks)[:2])
    x = permutation.mT @ rhs.unsqueeze(-1)
    x = torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, x, upper=True).squeeze(-1)
