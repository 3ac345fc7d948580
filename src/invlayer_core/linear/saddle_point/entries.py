"""A matrix by its entries, on the host in NumPy: what sparse systems are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

__all__ = ["Entries", "stable_order", "stacked", "symmetric_part"]


@final
@dataclass(frozen=True, eq=False)
class Entries:
    """A sparse matrix by its entries, each place at most once; ``M @ x`` for a vector, and ``M.T``."""

    shape: tuple[int, int]
    row: np.ndarray
    column: np.ndarray
    value: np.ndarray

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        product: np.ndarray = np.bincount(self.row, self.value * x[self.column], self.shape[0])
        return product

    @property
    def T(self) -> Entries:  # noqa: N802 (as NumPy has it)
        """Rows and columns exchanged."""
        return Entries(self.shape[::-1], self.column, self.row, self.value)

    def by_rows(self) -> Entries:
        """The same, row by row with ascending columns."""
        keys = self.row * self.shape[1] + self.column
        if (keys[1:] > keys[:-1]).all():
            return self
        order = keys.argsort()
        return Entries(self.shape, self.row[order], self.column[order], self.value[order])


def symmetric_part(matrix: Entries) -> Entries:
    """½ (M + Mᵀ)."""
    row, column, value = matrix.row, matrix.column, matrix.value
    if np.array_equal(row, column):
        return matrix
    n = matrix.shape[0]
    places, slot = np.unique(np.concatenate([row * n + column, column * n + row]), return_inverse=True)
    halves = np.bincount(slot, np.concatenate([0.5 * value, 0.5 * value]), len(places))
    return Entries(matrix.shape, places // n, places % n, halves)


def stacked(blocks: list[Entries], columns: int) -> Entries:
    """One above the other."""
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        nothing = np.zeros(0, dtype=np.int64)
        return Entries((0, columns), nothing, nothing, np.zeros(0))
    first = np.cumsum([0, *(block.shape[0] for block in blocks)])
    return Entries(
        (int(first[-1]), columns),
        np.concatenate([block.row + start for block, start in zip(blocks, first, strict=False)]),
        np.concatenate([block.column for block in blocks]),
        np.concatenate([block.value for block in blocks]),
    )


def stable_order(keys: np.ndarray, bound: int) -> np.ndarray:
    """What sorts whole numbers below a bound, equal ones in the order they come in.

    NumPy sorts 16 bits in linear time, and a digit after the other sorts all.
    """
    order: np.ndarray = (keys & 0xFFFF).astype(np.uint16).argsort(kind="stable")
    for shift in range(16, int(bound).bit_length(), 16):
        digit = (keys >> shift & 0xFFFF).astype(np.uint16)
        order = order[digit[order].argsort(kind="stable")]
    return order
