"""Unknowns of any structure as one real vector per sample, and back.

Every station of the spine works on one real tensor y of shape ``(*batch, n)``. A pytree of unknowns is
brought into that form at the border: each leaf, ``(*batch, *event)``, flattened to ``(*batch, k)``, a complex
one as pairs (real, imaginary), and all of them joined. Both ways are linear torch operations, so
derivatives pass through them as through any others; and C seen as R² makes no assumption about F, which
need not be holomorphic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Size, Tensor
from torch.utils import _pytree

from invlayer_core.errors import ConditionsError
from invlayer_core.leaves import (
    EventDims,
    batch_of,
    check_leaf,
    check_together,
    event_counts,
    flatten_up_to,
    named_tensors,
    structure_message,
)

__all__ = ["Leaf", "Structure", "matches", "pack_equations", "subtract"]


@final
@dataclass(frozen=True)
class Leaf:
    """One tensor among the unknowns: where it stands in the pytree, its event dims and its dtype."""

    path: str
    event: Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """How many real numbers it holds per sample."""
        return self.event.numel() * (2 if self.dtype.is_complex else 1)


@final
@dataclass(frozen=True)
class Structure:
    """How a pytree of tensors lies in one real vector per sample.

    Attributes
    ----------
    leaves : tuple of Leaf
        In the order of the pytree.
    dtype : torch.dtype
        That of the vector: the widest real dtype among the leaves, float32 at least.
    """

    leaves: tuple[Leaf, ...]
    dtype: torch.dtype
    _spec: Any

    @classmethod
    def of(cls, called: str, name: str, tree: Any, event_dims: EventDims) -> Structure:
        """The structure of ``tree``, whose leaves have the same batch dims and ``event_dims`` of their own.

        Raises
        ------
        ConditionsError
            If there is no tensor, or something else than tensors of floating-point or complex dtype; if
            ``event_dims`` is neither an integer nor integers in the structure of ``tree``; or if batch dims
            or devices differ.

        Examples
        --------
        >>> tree = {"pose": torch.zeros(5, 3), "gain": torch.zeros(5)}
        >>> structure = Structure.of("root", "y0", tree, event_dims={"pose": 1, "gain": 0})
        >>> structure.size, structure.pack("root", tree).shape
        (4, torch.Size([5, 4]))
        """
        names, tensors, spec = named_tensors(called, name, tree)
        counts = event_counts(called, name, spec, event_dims)
        check_together(called, names, tensors, counts)
        leaves = tuple(
            Leaf(leaf_name.removeprefix(name), tensor.shape[tensor.ndim - count :], tensor.dtype)
            for leaf_name, tensor, count in zip(names, tensors, counts, strict=True)
        )
        return cls(leaves, functools.reduce(torch.promote_types, map(_real, leaves)), spec)

    @property
    def size(self) -> int:
        """n, the number of real unknowns of one system."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def is_complex(self) -> bool:
        """Whether any leaf is."""
        return any(leaf.dtype.is_complex for leaf in self.leaves)

    def pack(self, called: str, tree: Any) -> Tensor:
        """``tree`` as one tensor ``(*batch, n)``.

        Raises
        ------
        ConditionsError
            If ``tree`` has another structure, or its leaves other shapes.
        """
        tensors = flatten_up_to(self._spec, called, tree)
        for leaf, tensor in zip(self.leaves, tensors, strict=True):
            check_leaf(called, f"y{leaf.path}", tensor)
            if tensor.is_complex() and not leaf.dtype.is_complex:
                raise ConditionsError(
                    f"{called}: y{leaf.path} has dtype {tensor.dtype}; accepted is a real one, such as "
                    f"{leaf.dtype}. Give a complex guess where the unknown is complex."
                )
        batch = batch_of(tensors[0], len(self.leaves[0].event))
        for leaf, tensor in zip(self.leaves, tensors, strict=True):
            if tensor.shape != batch + leaf.event:
                raise ConditionsError(
                    f"{called}: y{leaf.path} has shape {tuple(tensor.shape)}; accepted is "
                    f"{tuple(batch + leaf.event)}."
                )
        vectors = [
            _as_real(tensor.to(_working(leaf.dtype)), batch)
            for leaf, tensor in zip(self.leaves, tensors, strict=True)
        ]
        return torch.cat([vector.to(self.dtype) for vector in vectors], -1)

    def unpack(self, vector: Tensor) -> Any:
        """``(*batch, n)`` as the pytree again, every leaf in the precision of ``vector``."""
        pieces = vector.split([leaf.size for leaf in self.leaves], -1)
        tensors = [_shaped(leaf, piece) for leaf, piece in zip(self.leaves, pieces, strict=True)]
        return _pytree.tree_unflatten(tensors, self._spec)

    def restore(self, vector: Tensor, dtype: torch.dtype | None = None) -> Any:
        """As :meth:`unpack`, every leaf in its own dtype; or in ``dtype`` or its complex counterpart."""

        def own(leaf: Leaf, tensor: Tensor) -> Tensor:
            if dtype is None:
                return tensor.to(leaf.dtype)
            return tensor.to(dtype.to_complex() if leaf.dtype.is_complex else dtype)

        tensors = self._spec.flatten_up_to(self.unpack(vector))
        return _pytree.tree_unflatten(list(map(own, self.leaves, tensors)), self._spec)

    def describe(self) -> str:
        """The leaves and their event shapes, for messages."""
        return ", ".join(f"y{leaf.path} {tuple(leaf.event)} {leaf.dtype}" for leaf in self.leaves)


def matches(event_dims: EventDims, tree: Any) -> bool:
    """Whether ``tree`` is tensors or arrays in the structure of ``event_dims``."""
    try:
        leaves = _pytree.tree_structure(event_dims).flatten_up_to(tree)
    except ValueError:
        return False
    return all(isinstance(leaf, Tensor) or hasattr(leaf, "__array__") for leaf in leaves)


def pack_equations(called: str, value: Any, batch: Size) -> Tensor:
    """A pytree of residuals, each ``(*batch, ...)``, as one real tensor ``(*batch, m)``.

    Raises
    ------
    ConditionsError
        If something in it is no tensor of floating-point or complex dtype with these batch dims.
    """
    paths, _ = _pytree.tree_flatten_with_path(value)
    if not paths:
        raise ConditionsError(f"{called} returned {value!r}; accepted are tensors.")
    for path, leaf in paths:
        where = f"{called} returned {{}}{' at ' + _pytree.keystr(path) if path else ''}; accepted {{}}"
        if not isinstance(leaf, Tensor):
            raise ConditionsError(where.format(type(leaf).__name__, "are tensors, one or a pytree of them."))
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ConditionsError(
                where.format(f"dtype {leaf.dtype}", "are floating-point and complex dtypes.")
            )
        if leaf.shape[: len(batch)] != batch:
            accepted = (
                f"is {tuple(batch)}, the batch dims of y, followed by one system's equations. If args are "
                "batched, give every leaf of y (or y0) the same batch dims."
            )
            raise ConditionsError(where.format(f"shape {tuple(leaf.shape)}", accepted))
    return torch.cat([_as_real(leaf, batch) for _, leaf in paths], -1)


def subtract(called: str, value: Any, other: Any, like: str = "y") -> list[Tensor]:
    """The leaves of ``value`` minus those of ``other``, two pytrees of the same structure.

    Raises
    ------
    ConditionsError
        If the structures differ.
    """
    subtrahends, spec = _pytree.tree_flatten(other)
    minuends = flatten_up_to(spec, called, value, like)
    for minuend in minuends:
        if not isinstance(minuend, Tensor):
            raise ConditionsError(structure_message(called, value, spec, like))
    return [minuend - subtrahend for minuend, subtrahend in zip(minuends, subtrahends, strict=True)]


def _working(dtype: torch.dtype) -> torch.dtype:
    """As ``inputs.working_precision``: float32 for half precision, else ``dtype``; complex likewise."""
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return torch.promote_types(dtype, torch.float32)


def _real(leaf: Leaf) -> torch.dtype:
    return _working(leaf.dtype).to_real()


def _as_real(tensor: Tensor, batch: Size) -> Tensor:
    """``(*batch, ...)`` as real vectors ``(*batch, k)``."""
    if tensor.is_complex():
        tensor = torch.stack([tensor.real, tensor.imag], -1)
    return tensor.reshape((*batch, tensor.shape[len(batch) :].numel()))


def _shaped(leaf: Leaf, piece: Tensor) -> Tensor:
    batch = piece.shape[:-1]
    if not leaf.dtype.is_complex:
        return piece.reshape((*batch, *leaf.event))
    pairs = piece.reshape((*batch, *leaf.event, 2))
    return torch.complex(pairs[..., 0], pairs[..., 1])
