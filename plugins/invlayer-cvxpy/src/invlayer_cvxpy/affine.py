"""A sparse affine map in torch, for a whole batch at once."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor

__all__ = ["SparseAffine"]

_PADDED = 3  # entries per row up to which a loop over them beats adding up by rows


@final
class SparseAffine:
    """``θ -> offset + M θ`` on the last dimension, differentiable to every order, on any device.

    It keeps NumPy arrays: tensors that are made under ``torch.func`` must not outlive the transform.

    Parameters
    ----------
    matrix : sparse array of shape ``(r, p)``
    offset : array of shape ``(r,)``
    """

    def __init__(self, matrix: Any, offset: np.ndarray) -> None:
        matrix = csr_array(matrix)
        matrix.sum_duplicates()
        self.size = matrix.shape[0]
        self.offset = np.asarray(offset, dtype=np.float64).reshape(-1)
        self.is_constant = matrix.nnz == 0
        self.is_identity = _is_identity(matrix) and not bool(self.offset.any())
        counts = np.diff(matrix.indptr)
        self._terms: list[tuple[np.ndarray, np.ndarray]] = []  # columns and coefficients, one of each per row
        self._entries: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        if not self.is_constant and counts.max() <= _PADDED:
            self._terms = [_kth_of_each_row(matrix, counts, k) for k in range(counts.max())]
        elif not self.is_constant:
            entries = coo_array(matrix)
            rows, cols = (index.astype(np.int64) for index in entries.coords)
            self._entries = rows, cols, entries.data.astype(np.float64)

    def __call__(self, theta: Tensor) -> Tensor:
        """``(*batch, p)`` to ``(*batch, r)``; ``(r,)`` if the map is constant."""
        offset = _like(self.offset, theta)
        if self.is_constant:
            return offset
        if self.is_identity:
            return theta
        lead = theta.shape[:-1]
        result = offset.expand(*lead, self.size)
        for cols, coefficients in self._terms:
            index = _index(cols, theta).expand(*lead, self.size)
            result = result + _like(coefficients, theta) * theta.gather(-1, index)
        if self._entries is not None:
            rows, cols, coefficients = self._entries
            products = _like(coefficients, theta) * theta.gather(-1, _index(cols, theta).expand(*lead, -1))
            result = result.scatter_add(-1, _index(rows, theta).expand(products.shape), products)
        return result


def _like(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like)


def _index(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


def _is_identity(matrix: csr_array) -> bool:
    n = matrix.shape[0]
    return (
        matrix.shape[1] == n == matrix.nnz
        and bool((matrix.indices == np.arange(n)).all())
        and bool((matrix.data == 1.0).all())
    )


def _kth_of_each_row(matrix: csr_array, counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k-th entry of every row; 0 times the first column where there is none."""
    has, place = counts > k, np.minimum(matrix.indptr[:-1] + k, matrix.nnz - 1)
    cols = np.where(has, matrix.indices[place], 0).astype(np.int64)
    return cols, np.where(has, matrix.data[place], 0.0).astype(np.float64)
