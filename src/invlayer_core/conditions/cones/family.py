"""What every cone is to the conditions: a projection onto its dual, and the matrix of its derivative."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["ConeFamily"]


class ConeFamily(ABC):
    """Cones K of one kind and one size, all treated at once.

    The projection onto a closed convex cone is the gradient of a convex function, so the matrix of its
    derivative is symmetric: the two rules of automatic differentiation are one.

    Attributes
    ----------
    size : int
        k, the dimension of one cone.
    diagonal : bool
        Whether :meth:`derivative` is given by its diagonal.
    """

    size: int
    diagonal: bool = False

    @abstractmethod
    def project_dual(self, v: Tensor) -> Tensor:
        """The projection of ``v`` ``(*batch, count, k)`` onto the dual cone K*, differentiable."""

    @abstractmethod
    def derivative(self, v: Tensor) -> Tensor:
        """Its derivative at ``v``, ``(*batch, count, k, k)``, or the diagonal ``(*batch, count, k)``."""
