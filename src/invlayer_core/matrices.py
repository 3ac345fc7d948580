"""A matrix as one differentiable tensor: its entries, or the values on a sparsity pattern.

The form (dense, or which pattern) is no tensor and carries no derivative; what it holds is one tensor with
the batch dims in front. So a sparse matrix takes part in torch's transforms like any other argument, and its
gradient lives on the pattern.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["DenseForm", "MatrixForm", "SparseForm"]


class MatrixForm(ABC):
    """How an m × n matrix is held.

    Attributes
    ----------
    rows, columns : int
    event_dims : int
        How many trailing dims of the tensor are one matrix.
    """

    rows: int
    columns: int
    event_dims: int

    @abstractmethod
    def multiply(self, held: Tensor, x: Tensor) -> Tensor:
        """``M x``, ``(*batch, n) -> (*batch, m)``."""

    @abstractmethod
    def multiply_transposed(self, held: Tensor, y: Tensor) -> Tensor:
        """``Mᵀ y``, ``(*batch, m) -> (*batch, n)``."""

    @abstractmethod
    def outer(self, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """``left rightᵀ``, ``(*batch, m, k)`` and ``(*batch, n, k)``, summed to the shape of ``like``."""

    @abstractmethod
    def row_norms(self, held: Tensor) -> Tensor:
        """The Euclidean norm of every row, ``(*batch, m)``; 1 for a row of zeros."""

    def largest(self, held: Tensor) -> Tensor:
        """The largest entry, in size: ``(*batch,)``; 0 if there is none."""
        flat = held.flatten(-self.event_dims)
        return flat.abs().amax(-1) if flat.shape[-1] else flat.new_zeros(flat.shape[:-1])

    @abstractmethod
    def dense(self, held: Tensor) -> Tensor:
        """The matrix itself, ``(*batch, m, n)``."""


@final
@dataclass(frozen=True)
class DenseForm(MatrixForm):
    """Every entry: a tensor ``(*batch, m, n)``."""

    rows: int
    columns: int
    event_dims: int = 2

    def multiply(self, held: Tensor, x: Tensor) -> Tensor:
        return x @ held.mT if held.ndim == 2 else (held @ x.unsqueeze(-1)).squeeze(-1)

    def multiply_transposed(self, held: Tensor, y: Tensor) -> Tensor:
        return y @ held if held.ndim == 2 else (held.mT @ y.unsqueeze(-1)).squeeze(-1)

    def outer(self, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        if like.ndim == 2 and left.ndim > 2:  # shared by the batch: the sum over samples is one product
            left = left.movedim(-2, 0).reshape(self.rows, -1)
            right = right.movedim(-2, 0).reshape(self.columns, -1)
            return left @ right.mT
        product = left @ right.mT
        return product if product.shape == like.shape else product.sum_to_size(like.shape)

    def row_norms(self, held: Tensor) -> Tensor:
        return _nonzero(torch.linalg.vector_norm(held, dim=-1))

    def dense(self, held: Tensor) -> Tensor:
        return held


@final
@dataclass(frozen=True, eq=False)
class SparseForm(MatrixForm):
    """Values on a pattern that all samples share: a tensor ``(*batch, nnz)``.

    Attributes
    ----------
    row, column : Tensor of int64, shape ``(nnz,)``
        Where each value stands; each place once.
    """

    rows: int
    columns: int
    row: Tensor
    column: Tensor
    event_dims: int = 1

    def multiply(self, held: Tensor, x: Tensor) -> Tensor:
        return _scatter(held * x.index_select(-1, self.column), self.row, self.rows)

    def multiply_transposed(self, held: Tensor, y: Tensor) -> Tensor:
        return _scatter(held * y.index_select(-1, self.row), self.column, self.columns)

    def outer(self, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        picked = left.index_select(-2, self.row) * right.index_select(-2, self.column)
        product = picked.sum(-1)
        return product if product.shape == like.shape else product.sum_to_size(like.shape)

    def row_norms(self, held: Tensor) -> Tensor:
        return _nonzero(_scatter(held * held, self.row, self.rows).sqrt())

    def dense(self, held: Tensor) -> Tensor:
        flat = _scatter(held, self.row * self.columns + self.column, self.rows * self.columns)
        return flat.unflatten(-1, (self.rows, self.columns))


def _scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Values ``(*batch, nnz)`` added up where their index says: ``(*batch, size)``."""
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, index, values)


def _nonzero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, torch.ones_like(norms))
