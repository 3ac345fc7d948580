"""The charts of a whole pytree of unknowns, as those of one vector per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Size, Tensor
from torch.utils import _pytree

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError
from invlayer_core.leaves import EventDims, flatten_up_to
from invlayer_core.manifolds.manifold import Manifold
from invlayer_core.structured import Leaf, Structure

__all__ = ["Atlas"]

_OFF = 1e-3  # a point further from the manifold than rounding brings it is none


@final
@dataclass(frozen=True)
class _Part:
    """One leaf of the unknowns: ``many`` points of one manifold per sample."""

    leaf: Leaf
    manifold: Manifold

    @property
    def many(self) -> Size:
        return self.leaf.event[: len(self.leaf.event) - len(self.manifold.shape)]

    @property
    def coordinates(self) -> int:
        return self.many.numel() * self.manifold.tangent_size

    def points(self, piece: Tensor) -> Tensor:
        """``(*batch, k)`` as ``(*batch, *many, *shape)``."""
        return piece.reshape((*piece.shape[:-1], *self.leaf.event))

    def deltas(self, piece: Tensor) -> Tensor:
        """``(*batch, k)`` as ``(*batch, *many, tangent_size)``."""
        return piece.reshape((*piece.shape[:-1], *self.many, self.manifold.tangent_size))


@final
@dataclass(frozen=True)
class Atlas:
    """Points, packed ``(*batch, m)``, and coordinates around them, ``(*batch, n)``.

    The coordinates z of a chart are counted from what the base point itself measures, z = scale + δ, so that
    "a small fraction of z" is a small move of y. Those of a vector are the vector.

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
        if isinstance(manifold, Manifold):
            manifolds = [manifold] * len(structure.leaves)
        else:
            spec = _pytree.tree_structure(y0)
            manifolds = flatten_up_to(spec, f"{called}(manifold=...)", manifold, "y0")
        for leaf, one in zip(structure.leaves, manifolds, strict=True):
            _check(called, leaf, one)
        return cls(structure, tuple(manifolds))

    @property
    def _parts(self) -> list[_Part]:
        return [_Part(*pair) for pair in zip(self.structure.leaves, self.manifolds, strict=True)]

    def start(self, base: Tensor) -> Tensor:
        """The coordinates of ``base`` in its own chart."""
        return self._joined(lambda part, y: part.manifold.scale(y), base)

    def point(self, base: Tensor, z: Tensor) -> Tensor:
        """The point at coordinates ``z`` in the chart at ``base``."""
        parts = self._parts
        deltas = iter((z - self.start(base)).split([part.coordinates for part in parts], -1))
        return self._joined(lambda part, y: part.manifold.retract(y, part.deltas(next(deltas))), base)

    def coordinates(self, base: Tensor, other: Tensor) -> Tensor:
        """The inverse of :meth:`point`: those of ``other``."""
        return self.start(base) + self._joined(lambda part, *pair: part.manifold.local(*pair), base, other)

    def change_of_chart(self, base: Tensor, z: Tensor) -> Tensor:
        """∂δ/∂z ``(*batch, n, n)``, where δ are coordinates at the point that ``z`` stands for."""

        def one(base: Tensor, z: Tensor) -> Tensor:
            point = self.point(base, z)
            change: Tensor = torch.func.jacrev(
                lambda moved: self.coordinates(point, self.point(base, moved))
            )(z)
            return change

        n = z.shape[-1]
        changes = torch.vmap(one)(base.reshape(-1, base.shape[-1]), z.reshape(-1, n))
        return changes.reshape(*z.shape, n)

    def project(self, base: Tensor) -> Tensor:
        """``base`` without rounding errors."""
        return self._joined(lambda part, y: part.manifold.project(y), base)

    def distance(self, base: Tensor, z: Tensor) -> Tensor:
        """How far ``z`` is from ``base``, ``(*batch,)``: the largest move along a curved direction."""
        moves = (z - self.start(base)).abs().split([part.coordinates for part in self._parts], -1)
        curved = [move for move, one in zip(moves, self.manifolds, strict=True) if not one.is_flat]
        return torch.cat([*curved, torch.zeros_like(z[..., :1])], -1).amax(-1)

    def checked(self, called: str, base: Tensor) -> Tensor:
        """As :meth:`project`.

        Raises
        ------
        ConditionsError
            If ``base`` is further off its manifold than by rounding.
        """
        projected = self.project(base)
        off = ~((projected - base).abs() <= _OFF * (1 + base.abs())) & base.isfinite()
        if not bool(_functorch.plain(off).any()):
            return projected
        names = ", ".join(f"y{part.leaf.path}: {type(part.manifold).__name__}" for part in self._parts)
        raise ConditionsError(
            f"{called} is not on its manifold ({names}). Accepted are points as the manifold has them, such "
            "as unit quaternions (x, y, z, w) for SO3: manifold.project(y) makes one of what is near, and "
            "manifold.exp(delta) of coordinates."
        )

    def _joined(self, function: Callable[..., Tensor], *packed: Tensor) -> Tensor:
        """What ``function`` makes of the points of each part, as one vector per sample."""
        batch, sizes = packed[0].shape[:-1], [leaf.size for leaf in self.structure.leaves]
        pieces = zip(*(one.split(sizes, -1) for one in packed), strict=True)
        results = [
            function(part, *map(part.points, together))
            for part, together in zip(self._parts, pieces, strict=True)
        ]
        flat = [one.reshape((*batch, one.shape[len(batch) :].numel())) for one in results]
        return torch.cat(flat, -1)


def _check(called: str, leaf: Leaf, manifold: Any) -> None:
    if not isinstance(manifold, Manifold):
        what = f"the class {manifold.__name__}" if isinstance(manifold, type) else repr(manifold)
        raise ConditionsError(
            f"{called}: manifold= has {what} for y0{leaf.path}; accepted is an instance of a Manifold, such "
            "as inv.manifolds.SE3() or Euclidean(), or a pytree of them like y0."
        )
    shape = tuple(manifold.shape)
    if leaf.dtype.is_complex or leaf.event[max(0, len(leaf.event) - len(shape)) :] != shape:
        accepted = ", ".join(map(str, ("*batch", *shape)))
        raise ConditionsError(
            f"{called}: y0{leaf.path} has event shape {tuple(leaf.event)} and dtype {leaf.dtype}; accepted "
            f"for {type(manifold).__name__}() are real tensors ({accepted}). Where one sample has many "
            "points, event_dims= counts the dims before as well."
        )
