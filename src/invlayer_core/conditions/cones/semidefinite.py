"""The cone of positive semidefinite matrices, its own dual, in the svec basis.

A symmetric matrix is its upper triangle, column by column, off-diagonal entries times √2: the inner product
of vectors is then that of matrices. The projection of V is X₊ = (|V| + V) / 2 with |V| = (V²)^½, and no
derivative goes through the eigenvectors, which have none where eigenvalues meet. Instead |V| |V| = V V gives

    A dA + dA A = V dV + dV V,     A = |V|,

a Lyapunov equation, whose operator is regular wherever V is (Higham 2008, Functions of Matrices, ch. 5).
In the eigenbasis its solution is the matrix of divided differences (λᵢ + λⱼ) / (|λᵢ| + |λⱼ|) ∘ dV. It is
differentiated by the same equation again, so derivatives of every order are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.cones.custom import refuse_nested_forward
from invlayer_core.conditions.cones.family import ConeFamily

__all__ = ["SemidefiniteFamily", "svec_indices"]


def svec_indices(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of each entry of svec, ``(k,)`` each."""
    cols, rows = torch.tril_indices(
        side, side
    )  # row by row of a lower triangle: column by column of an upper
    return rows, cols


@final
@dataclass(frozen=True)
class SemidefiniteFamily(ConeFamily):
    """Positive semidefinite matrices of one size."""

    side: int

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.side * (self.side + 1) // 2

    def project_dual(self, v: Tensor) -> Tensor:
        refuse_nested_forward("the semidefinite cone")
        return 0.5 * (_svec(_absolute(_smat(v, self.side))[0]) + v)

    def derivative(self, v: Tensor) -> Tensor:
        refuse_nested_forward("the semidefinite cone")
        matrix = _smat(v, self.side)
        absolute, vectors, values = _absolute(matrix)
        basis = _smat(torch.eye(self.size, dtype=v.dtype, device=v.device), self.side)
        rhs = _twice_symmetric(matrix.unsqueeze(-3) @ basis)
        columns = _lyapunov(absolute, rhs, vectors, values)
        identity = torch.eye(self.size, dtype=v.dtype, device=v.device)
        return 0.5 * (_svec(columns) + identity)


def _scales(side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = (index.to(like.device) for index in svec_indices(side))
    scale = 1.0 - (1.0 - 2.0**-0.5) * (rows != cols).to(like.dtype)
    return rows, cols, scale


def _smat(v: Tensor, side: int) -> Tensor:
    """``(..., k)`` as symmetric matrices ``(..., side, side)``."""
    rows, cols, scale = _scales(side, v)
    place = torch.empty(side, side, dtype=torch.int64, device=v.device)
    place[rows, cols] = place[cols, rows] = torch.arange(len(rows), device=v.device)
    scaled = v * scale
    full = scaled.gather(-1, place.reshape(-1).expand(*v.shape[:-1], -1))
    return full.reshape(*v.shape[:-1], side, side)


def _svec(matrix: Tensor) -> Tensor:
    side = matrix.shape[-1]
    rows, cols, scale = _scales(side, matrix)
    flat = matrix.reshape(*matrix.shape[:-2], side * side)
    return flat.gather(-1, (rows * side + cols).expand(*flat.shape[:-1], -1)) / scale


def _twice_symmetric(matrix: Tensor) -> Tensor:
    return matrix + matrix.mT


def _absolute(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|V| ``(..., n, n)``, and its eigenvectors and eigenvalues, which carry no derivative."""
    return _functorch.apply(_Absolute, matrix)


def _lyapunov(absolute: Tensor, rhs: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    """S with A S + S A = rhs, ``(..., h, n, n)`` for ``absolute`` ``(..., n, n)``."""
    result: Tensor = _functorch.apply(_Lyapunov, absolute, rhs, vectors, values)
    return result


@final
@_functorch.with_cached_signature
class _Absolute(torch.autograd.Function):
    """V ↦ |V|; dA solves A dA + dA A = V dV + dV V at the output A."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, matrix, torch.zeros_like(matrix)))
        absolute = (vectors * values.abs().unsqueeze(-2)) @ vectors.mT
        absolute = torch.where(finite, absolute, torch.nan)
        return absolute, vectors, values.abs()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def _rule(ctx: Any, direction: Tensor) -> Tensor:
        matrix, absolute, vectors, values = _functorch.revive(ctx.saved_tensors)
        symmetric = 0.5 * _twice_symmetric(direction)
        rhs = _twice_symmetric(matrix @ symmetric)
        return _lyapunov(absolute, rhs.unsqueeze(-3), vectors, values).squeeze(-3)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> Tensor:
        # The operator dV ↦ dA is self-adjoint: L⁻¹ and dV ↦ V dV + dV V commute, both symmetric.
        return _Absolute._rule(ctx, cotangent)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        return _Absolute._rule(ctx, tangent), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], matrix: Tensor) -> Any:
        return _Absolute.apply(_functorch.mapped_first(matrix, in_dims[0], info.batch_size)), (0, 0, 0)


@final
@_functorch.with_cached_signature
class _Lyapunov(torch.autograd.Function):
    """S with A S + S A = R; dS solves it for dR − dA S − S dA, and the operator is its own adjoint."""

    @staticmethod
    def forward(absolute: Tensor, rhs: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
        turned = vectors.unsqueeze(-3)
        sums = (values.unsqueeze(-1) + values.unsqueeze(-2)).unsqueeze(-3)
        inner = turned.mT @ rhs @ turned
        # Two eigenvalues that are zero: |V| has no derivative there, and 0 is the middle of what it could be.
        return turned @ torch.where(sums > 0, inner / sums, torch.zeros_like(inner)) @ turned.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        absolute, _, vectors, values = inputs
        ctx.save_for_backward(absolute, vectors, values, output)
        ctx.save_for_forward(absolute, vectors, values, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        absolute, vectors, values, solution = _functorch.revive(ctx.saved_tensors)
        rhs_bar = _lyapunov(absolute, 0.5 * _twice_symmetric(cotangent), vectors, values)
        if not ctx.needs_input_grad[0]:
            return None, rhs_bar, None, None
        return -_twice_symmetric(rhs_bar @ solution).sum(-3), rhs_bar, None, None

    @staticmethod
    def jvp(ctx: Any, absolute_dot: Tensor | None, rhs_dot: Tensor | None, *_: None) -> Tensor:
        absolute, vectors, values, solution = _functorch.revive(ctx.saved_tensors)
        rhs = torch.zeros_like(solution) if rhs_dot is None else rhs_dot
        if absolute_dot is not None:
            rhs = rhs - _twice_symmetric(absolute_dot.unsqueeze(-3) @ solution)
        return _lyapunov(absolute, rhs, vectors, values)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> Any:
        moved = [
            _functorch.mapped_first(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims, strict=True)
        ]
        return _Lyapunov.apply(*moved), 0
