"""Which linear solver serves a batch best, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from invlayer_core.linear.iterative import GMRES
from invlayer_core.linear.methods import LU, LinearSolver
from invlayer_core.structure import SystemShape

__all__ = ["Auto"]

_DENSE_LIMIT = 2**30  # bytes of Jacobian blocks


@final
@dataclass(frozen=True)
class Auto(LinearSolver):
    """LU as long as the Jacobian blocks of the batch fit into ``dense_limit`` bytes, GMRES beyond.

    LU is exact whatever J is; a Krylov method is faster from some hundred unknowns on if it takes few steps,
    which only the user knows, and so it is not chosen for speed. ``SolveInfo.linear_solver`` has the choice.

    Parameters
    ----------
    dense_limit : int
        Bytes of all blocks together; 1 GiB.

    Examples
    --------
    >>> import torch
    >>> shape = SystemShape(torch.Size((64,)), torch.Size((16,)))
    >>> Auto().choose(shape, torch.float64)
    LU()
    >>> print(Auto().reason(shape, torch.float64))
    the blocks of 64 systems of 16 unknowns take 128 KiB
    """

    dense_limit: int = _DENSE_LIMIT

    @property
    def matrix_free(self) -> bool:
        return False

    def choose(self, shape: SystemShape, dtype: torch.dtype) -> LinearSolver:
        """The solver for systems of this shape."""
        return LU() if _bytes(shape, dtype) <= self.dense_limit else GMRES()

    def reason(self, shape: SystemShape, dtype: torch.dtype) -> str:
        """Why it is that one, in words."""
        size = _bytes(shape, dtype)
        beyond = "" if size <= self.dense_limit else f", more than {_in_words(self.dense_limit)}"
        return f"the blocks of {shape.count} systems of {shape.size} unknowns take {_in_words(size)}{beyond}"


def _bytes(shape: SystemShape, dtype: torch.dtype) -> int:
    return shape.count * shape.size**2 * dtype.itemsize


def _in_words(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
