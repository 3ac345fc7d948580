"""The charts of a whole pytree of unknowns, as those of one vector per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError
from invlayer_core.leaves import EventDims, flatten_up_to
from invlayer_core.manifolds.manifold import Manifold
from invlayer_core.structured import Leaf, Structure

__all__ = ["Atlas"]

_OFF = 1e-3  # a point further from the manifold than by rounding is none


@final
@dataclass(frozen=True)
class Atlas:
    """Points, packed ``(*batch, m)``, and coordinates around them, ``(*batch, n)``.

    The coordinates z of a chart are counted from what the base point itself measures, z = scale + δ, so that
    "a small fraction of z" is a small move of y. Of a vector, they are the vector.

    Attributes
    ----------
    structure : Structure
        Of the points.
    manifolds : tuple of Manifold
        One for each leaf. A leaf may hold many points of its manifold.
    """

    structure: Structure
    manifolds: tuple[Manifold, ...]

    @classmethod
    def of(cls, called: str, y0: Any, manifold: Any, event_dims: EventDims) -> Atlas:
        """The charts for unknowns like ``y0``: one manifold for all leaves, or one for each.

        Raises
        ------
        ConditionsError
            If ``manifold`` has something else than manifolds, or another structure than ``y0``; or if a leaf
            has not the shape of its points.
        """
        structure = Structure.of(called, "y0", y0, event_dims)
        spec = _pytree.tree_structure(y0)
        if isinstance(manifold, Manifold):
            manifolds = [manifold] * len(structure.leaves)
        else:
            manifolds = flatten_up_to(spec, f"{called}(manifold=...)", manifold, "y0")
        for leaf, one in zip(structure.leaves, manifolds, strict=True):
            _check(called, leaf, one)
        return cls(structure, tuple(manifolds))

    @property
    def size(self) -> int:
        """n, how many coordinates one sample has."""
        return sum(map(_coordinates, self.structure.leaves, self.manifolds))

    def start(self, base: Tensor) -> Tensor:
        """The coordinates of ``base`` in its own chart."""
        return self._joined(lambda manifold, y: manifold.scale(y), base)

    def point(self, base: Tensor, z: Tensor) -> Tensor:
        """The point at coordinates ``z`` in the chart at ``base``."""
        deltas = (z - self.start(base)).split(list(map(_coordinates, self.structure.leaves, self.manifolds)), -1)
        points = [
            manifold.retract(y, _rows(manifold, leaf, delta))
            for manifold, leaf, y, delta in self._zipped(base, deltas)
        ]
        return torch.cat([_flat(point, base) for point in points], -1)

    def coordinates(self, base: Tensor, other: Tensor) -> Tensor:
        """The inverse of :meth:`point`: those of ``other``."""
        return self.start(base) + self._joined(lambda manifold, *pair: manifold.local(*pair), base, other)

    def project(self, base: Tensor) -> Tensor:
        """Rounding errors taken away."""
        return self._joined(lambda manifold, y: manifold.project(y), base)

    def distance(self, base: Tensor, z: Tensor) -> Tensor:
        """How far ``z`` is from ``base``, ``(*batch,)``: the largest move along a curved direction."""
        curved = [
            torch.full((_coordinates(leaf, manifold),), 0.0 if manifold.is_flat else 1.0)
            for leaf, manifold in zip(self.structure.leaves, self.manifolds, strict=True)
        ]
        return ((z - self.start(base)).abs() * torch.cat(curved).to(z)).amax(-1)

    def checked(self, called: str, base: Tensor) -> Tensor:
        """``base`` without rounding errors.

        Raises
        ------
        ConditionsError
            If it is no point of the manifold.
        """
        projected = self.project(base)
        off = ~((projected - base).abs() <= _OFF * (1 + base.abs())) & base.isfinite()
        if bool(_functorch.plain(off).any()):
            names = ", ".join(
                f"y0{leaf.path} ({type(manifold).__name__})"
                for leaf, manifold in zip(self.structure.leaves, self.manifolds, strict=True)
            )
            raise ConditionsError(
                f"{called}: y0 is not on its manifold: {names}. Accepted are points in the representation of "
                "the manifold, such as unit quaternions (x, y, z, w) for SO3; manifold.project(y0) makes "
                "them so, and manifold.exp(delta) makes points."
            )
        return projected

    def _zipped(self, base: Tensor, *others: Any) -> Any:
        pieces = base.split([leaf.size for leaf in self.structure.leaves], -1)
        points = [
            _points(manifold, leaf, piece)
            for manifold, leaf, piece in zip(self.manifolds, self.structure.leaves, pieces, strict=True)
        ]
        return zip(self.manifolds, self.structure.leaves, points, *others, strict=True)

    def _joined(self, function: Callable[..., Tensor], *packed: Tensor) -> Tensor:
        """What ``function`` makes of the points of each leaf, as one vector per sample."""
        sizes = [leaf.size for leaf in self.structure.leaves]
        results = [
            function(manifold, *(_points(manifold, leaf, piece) for piece in pieces))
            for manifold, leaf, *pieces in zip(
                self.manifolds,
                self.structure.leaves,
                *(one.split(sizes, -1) for one in packed),
                strict=True,
            )
        ]
        return torch.cat([_flat(result, packed[0]) for result in results], -1)


def _points(manifold: Manifold, leaf: Leaf, piece: Tensor) -> Tensor:
    """``(*batch, k)`` as ``(*batch, *many, *shape)``."""
    return piece.reshape((*piece.shape[:-1], *leaf.event))


def _rows(manifold: Manifold, leaf: Leaf, delta: Tensor) -> Tensor:
    """``(*batch, k)`` as ``(*batch, *many, tangent_size)``."""
    return delta.reshape((*delta.shape[:-1], *_many(leaf, manifold), manifold.tangent_size))


def _many(leaf: Leaf, manifold: Manifold) -> tuple[int, ...]:
    """The dims of a leaf that count its points."""
    return tuple(leaf.event[: len(leaf.event) - len(manifold.shape)])


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    batch = like.shape[:-1]
    return tensor.reshape((*batch, tensor.shape[len(batch) :].numel()))


def _coordinates(leaf: Leaf, manifold: Manifold) -> int:
    return torch.Size(_many(leaf, manifold)).numel() * manifold.tangent_size


def _check(called: str, leaf: Leaf, manifold: Any) -> None:
    if not isinstance(manifold, Manifold):
        what = f"the class {manifold.__name__}" if isinstance(manifold, type) else repr(manifold)
        raise ConditionsError(
            f"{called}: manifold= has {what} for y0{leaf.path}; accepted is an instance of a Manifold, such as "
            "inv.manifolds.SE3() or Euclidean(), or a pytree of them like y0."
        )
    if leaf.dtype.is_complex or leaf.event[len(leaf.event) - len(manifold.shape) :] != manifold.shape or len(
        leaf.event
    ) < len(manifold.shape):
        raise ConditionsError(
            f"{called}: y0{leaf.path} has event shape {tuple(leaf.event)} and dtype {leaf.dtype}; accepted for "
            f"{type(manifold).__name__}() are real tensors (*batch, {', '.join(map(str, manifold.shape))}), or "
            "more dims of points of one sample before the last, counted by event_dims=."
        )
