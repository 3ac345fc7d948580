"""What a manifold is to a solver: points, and straight coordinates around each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Size, Tensor

__all__ = ["LieGroup", "Manifold"]


class Manifold(ABC):
    """Where an unknown lives, if that is no vector space: a rotation, a pose, a unit vector.

    A point is a plain tensor ``(*batch, *shape)``. Around each there is a chart: ``tangent_size`` real
    numbers δ, in which a solver may move as it likes. Everything is differentiable torch, to every order at
    δ = 0, without control flow on values; ``torch.func`` goes through it.

    A subclass has, of itself or of its instances, ``shape``, the ``torch.Size`` of one point, and
    ``tangent_size``, the dimension of the manifold. ``is_flat`` says that every chart is the whole manifold,
    and that moves in one are moves in all.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> class Positive(inv.manifolds.Manifold):
    ...     shape, tangent_size = torch.Size([1]), 1
    ...     def retract(self, y, delta):
    ...         return y * delta.exp()
    ...     def local(self, y, other):
    ...         return (other / y).log()
    >>> y0 = torch.ones(1, dtype=torch.float64)
    >>> y = inv.minimize(lambda y: (y.square() - 2).square().sum(-1), y0, manifold=Positive())
    >>> bool((y - 2**0.5).abs() < 1e-8)
    True
    """

    shape: Size
    tangent_size: int
    is_flat: ClassVar[bool] = False

    @abstractmethod
    def retract(self, y: Tensor, delta: Tensor) -> Tensor:
        """The point at ``delta`` ``(*batch, tangent_size)`` in the chart at ``y`` ``(*batch, *shape)``.

        At 0 it is ``y`` itself, and its derivative there has full rank.
        """

    @abstractmethod
    def local(self, y: Tensor, other: Tensor) -> Tensor:
        """Where ``other`` is in the chart at ``y``: the inverse of :meth:`retract`, near ``y``."""

    def project(self, y: Tensor) -> Tensor:
        """The point that ``y`` was meant to be, if rounding took it off the manifold."""
        return y

    def scale(self, y: Tensor) -> Tensor:
        """How large ``y`` is along each direction of its chart: what tolerances relative to y refer to."""
        batch = y.shape[: y.ndim - len(self.shape)]
        return y.new_ones((*batch, self.tangent_size))


class LieGroup(Manifold):
    """A manifold whose points can be composed; its charts are y · exp(δ), δ in the body frame of y."""

    @abstractmethod
    def exp(self, delta: Tensor) -> Tensor:
        """The point at δ ``(*batch, tangent_size)`` in the chart at the identity."""

    @abstractmethod
    def log(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`exp`; rotations by less than π."""

    @abstractmethod
    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """``first · second``: of two poses, ``second`` seen from ``first``."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """The point that composes with ``y`` to the identity."""

    @abstractmethod
    def act(self, y: Tensor, points: Tensor) -> Tensor:
        """``points`` ``(*batch, d)``, d = 2 or 3, moved by ``y``."""

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """``second`` seen from ``first``: first⁻¹ · second."""
        return self.compose(self.inverse(first), second)

    def identity(self, like: Tensor | None = None) -> Tensor:
        """The point that moves nothing, ``shape``, in dtype and on the device of ``like``."""
        zeros = torch.zeros(self.tangent_size) if like is None else like.new_zeros(self.tangent_size)
        return self.exp(zeros)

    def retract(self, y: Tensor, delta: Tensor) -> Tensor:
        return self.compose(y, self.exp(delta))

    def local(self, y: Tensor, other: Tensor) -> Tensor:
        return self.log(self.between(y, other))
