"""What a solve with a saddle-point matrix gives."""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

from torch import Tensor

__all__ = ["SaddlePoint", "SaddleSolution"]


@final
class SaddleSolution(NamedTuple):
    """A solution, and which samples of the batch have none to rounding.

    Attributes
    ----------
    w : Tensor of shape ``(V, B, N)``
    singular : Tensor of bool, shape ``(B,)``
        Where the matrix has no inverse: w is then the minimum-norm solution.
    loose : Tensor of bool, shape ``(B,)``
        Where x is not determined: the matrix maps some (x, 0) to zero.
    unsolvable : Tensor of bool, shape ``(B,)``
        Where it has no inverse and the system no solution; w fits it as well as can be.
    """

    w: Tensor
    singular: Tensor
    loose: Tensor
    unsolvable: Tensor


class SaddlePoint(Protocol):
    """A factorised batch of saddle-point systems."""

    def solve(self, rhs: Tensor) -> SaddleSolution:
        """w for right-hand sides ``(V, B, n + m)``."""
        ...
