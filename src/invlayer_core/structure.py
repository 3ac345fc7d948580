"""Shapes and arguments: which dims are batch, which are one system's unknowns, what is a tensor.

The one rule, with no guessing: the last ``event_dims`` dims of y are the unknowns of one system, all
leading dims are batch. ``(n,)`` with ``event_dims=1`` is one system, ``(B, n)`` is B systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Size, Tensor
from torch.utils import _pytree

from invlayer_core.errors import ConditionsError

__all__ = ["Arguments", "SystemShape"]


@final
@dataclass(frozen=True)
class SystemShape:
    """The shape of the unknown y, split into batch dims and event dims.

    Attributes
    ----------
    batch : torch.Size
        Leading dims: one system each.
    event : torch.Size
        The unknowns of one system.
    """

    batch: Size
    event: Size

    @classmethod
    def of(cls, y: Tensor, event_dims: Any) -> SystemShape:
        """Split the shape of ``y``.

        Raises
        ------
        ConditionsError
            If ``y`` has fewer than ``event_dims`` dims.

        Examples
        --------
        >>> import torch
        >>> SystemShape.of(torch.zeros(5, 3), event_dims=1).size
        3
        """
        try:
            too_few = y.ndim < event_dims
        except TypeError:
            raise ConditionsError(
                f"event_dims={event_dims!r} came with one tensor y of shape {tuple(y.shape)}; accepted is an "
                "integer. Integers in a structure are for a pytree of unknowns."
            ) from None
        if too_few:
            raise ConditionsError(
                f"y has shape {tuple(y.shape)}, with fewer dims than event_dims={event_dims}. The last "
                "event_dims dims of y are one system's unknowns; pass event_dims=0 for elementwise scalars."
            )
        split = y.ndim - event_dims
        return cls(y.shape[:split], y.shape[split:])

    @property
    def full(self) -> Size:
        """``(*batch, *event)``."""
        return self.batch + self.event

    @property
    def count(self) -> int:
        """B, the number of systems."""
        return self.batch.numel()

    @property
    def size(self) -> int:
        """n, the number of unknowns of one system."""
        return self.event.numel()

    def vectors(self, tensor: Tensor) -> Tensor:
        """``(*batch, ...)`` with one vector per sample: ``(*batch, m)``."""
        return tensor.reshape(*self.batch, tensor.shape[len(self.batch) :].numel())

    def mapped(self, size: int) -> SystemShape:
        """The shape with one more leading batch dim."""
        return SystemShape(Size((size, *self.batch)), self.event)


@final
class _TENSOR:
    """Marks the place of a tensor among the leaves; a class, as that stays itself when pickled."""


@final
@dataclass(frozen=True)
class Arguments:
    """The args of the conditions, taken apart into tensors (θ) and everything else.

    Attributes
    ----------
    tensors : tuple of Tensor
        Every tensor found in the pytree ``args``, in order.
    """

    tensors: tuple[Tensor, ...]
    _spec: Any
    _leaves: tuple[Any, ...]

    def __getstate__(self) -> tuple[Any, ...]:
        """For other processes: a tree in place of its specification, at whose unpickling torch warns."""
        tree = None if self._spec is None else _pytree.tree_unflatten([0] * len(self._leaves), self._spec)
        return self.tensors, tree, self._leaves

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        tensors, tree, leaves = state
        spec = None if tree is None else _pytree.tree_structure(tree)
        for name, value in (("tensors", tensors), ("_spec", spec), ("_leaves", leaves)):
            object.__setattr__(self, name, value)

    @classmethod
    def flatten(cls, args: Any) -> Arguments:
        """Take ``args`` apart: a tuple of pytrees, or one object standing for ``(object,)``."""
        args = args if isinstance(args, tuple) else (args,)
        if all(isinstance(arg, Tensor) for arg in args):  # the common case needs no pytree
            return cls(args, None, ())
        leaves, spec = _pytree.tree_flatten(args)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tensors, spec, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @property
    def are_tensors(self) -> bool:
        """Whether ``args`` is a plain tuple of tensors."""
        return self._spec is None

    def unflatten(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The args again, with the first of ``tensors`` in the places of the original ones."""
        if self._spec is None:
            return tuple(tensors[: len(self.tensors)])
        supply = iter(tensors)
        leaves = [next(supply) if leaf is _TENSOR else leaf for leaf in self._leaves]
        return tuple(_pytree.tree_unflatten(leaves, self._spec))
