"""The factors of the Jacobians of one call: made on first use, shared by all its cotangents.

A bank belongs to the graph of one solution and is freed with it. Within ``torch.func`` values are wrapped,
and mapped dimensions are further samples; there a bank is found by the values that its factors were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.pattern import SparsityPattern
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.solvers.direct import Factor, SparseMatrix

__all__ = ["FactorBank", "apply_factors", "solve_with_values"]


@final
class FactorBank:
    """Factors of B Jacobians.

    Attributes
    ----------
    handed : tuple of Factor or None
        One per sample, from the user's forward solve; empty if there are none.
    factors : list of Factor or None
        One per sample, our own; None where the Jacobian could not be factorised. Empty before the first use,
        unless Newton steps have left theirs.
    values : Tensor of shape ``(B, nnz)`` or None
        What the factors were made of.
    pattern : SparsityPattern or None
        As given, or as detected in the first use.
    """

    def __init__(self, handed: Sequence[Factor | None] = (), own: Sequence[Factor | None] = ()) -> None:
        self.handed = tuple(handed)
        self.factors: list[Factor | None] = list(own)
        self.values: Tensor | None = None
        self.pattern: SparsityPattern | None = None

    def factorise(self, method: SparseLU, values: Tensor) -> list[Factor | None]:
        """The factors for ``values`` ``(B, nnz)``, anew only if they differ from those of the last time."""
        if self.values is None or not torch.equal(self.values, values):
            assert self.pattern is not None
            self.factors = _factorise(method, self.pattern, values)
            self.values = values
        return self.factors


def _factorise(method: SparseLU, pattern: SparsityPattern, values: Tensor) -> list[Factor | None]:
    direct = method.direct_solver
    pointers = pattern.column_pointers.to(torch.int32).numpy()
    rows = pattern.rows.to(torch.int32).numpy()
    host = values.detach().to("cpu", torch.float64).contiguous()
    factors: list[Factor | None] = []
    for sample in host:
        if not bool(sample.isfinite().all()):
            factors.append(None)
            continue
        matrix = SparseMatrix(pattern.shape[0], pointers, rows, sample.numpy(), pattern.is_symmetric)
        try:
            factors.append(direct.factorise(matrix, method.options))
        except ArithmeticError:  # singular: that sample's affair alone
            factors.append(None)
    return factors


def apply_factors(factors: Sequence[Factor | None], rhs: Tensor, *, transpose: bool) -> Tensor:
    """Solve for plain ``rhs`` ``(..., B, n)``; NaN without a factor, zero where there is nothing to solve."""
    host = rhs.detach().to("cpu", torch.float64).contiguous()
    flat = host.reshape(-1, *host.shape[-2:])
    x = torch.full_like(flat, torch.nan)
    asked = (flat != 0).any(-1).tolist()
    solved, given = x.numpy(), flat.numpy()
    for k, directions in enumerate(given):
        for sample, (factor, b) in enumerate(zip(factors, directions, strict=True)):
            if not asked[k][sample]:
                solved[k, sample] = 0.0
            elif factor is not None:
                solved[k, sample] = _solve_one(factor, b, transpose)
    return x.reshape(rhs.shape).to(rhs.device, rhs.dtype)


def _solve_one(factor: Factor, b: np.ndarray, transpose: bool) -> np.ndarray:
    x = np.asarray((factor.solve_transposed if transpose else factor.solve)(b))
    if x.shape != b.shape or x.dtype.kind != "f":
        raise ConditionsError(
            f"a Factor returned {x.shape} numbers of dtype {x.dtype} for a right-hand side of shape "
            f"{b.shape}; accepted are real vectors, solve(b) of the shape of b."
        )
    return x


def solve_with_values(
    bank: FactorBank, method: SparseLU, values: Tensor, rhs: Tensor, *, transpose: bool
) -> Tensor:
    """Solve for ``rhs`` ``(B, n)`` with the Jacobians of these values, whatever transform is running."""
    if not _functorch.is_active():
        return apply_factors(bank.factorise(method, values), rhs, transpose=transpose)
    x: Tensor = _Solve.apply(values.detach(), rhs.detach().unsqueeze(0), bank, method, transpose)
    return x.squeeze(0)


@final
@_functorch.with_cached_signature
class _Solve(torch.autograd.Function):
    """The solve as ``torch.func`` sees it: plain tensors in and out, and no derivative of its own.

    ``values`` ``(B, nnz)``, ``rhs`` ``(K, B, n)``. Mapped values are further samples; where right-hand sides
    alone are mapped, the factors serve all of them.
    """

    @staticmethod
    def forward(values: Tensor, rhs: Tensor, bank: FactorBank, method: SparseLU, transpose: bool) -> Tensor:
        return apply_factors(bank.factorise(method, values), rhs, transpose=transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> None:
        raise AssertionError("the opaque solve has no derivative; its inputs are detached")

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], values: Tensor, rhs: Tensor, *settings: Any
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        rhs = _functorch.mapped_first(rhs, in_dims[1], size)  # (V, K, B, n)
        k, count, n = rhs.shape[1:]
        if in_dims[0] is None:
            x = _Solve.apply(values, rhs.reshape(size * k, count, n), *settings)
            return x.reshape(size, k, count, n), 0
        values = values.movedim(in_dims[0], 0).reshape(size * count, -1)
        x = _Solve.apply(values, rhs.transpose(0, 1).reshape(k, size * count, n), *settings)
        return x.reshape(k, size, count, n), 1
