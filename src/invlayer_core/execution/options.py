"""The options of a per-sample solver: of every tensor among them its row, and a fresh dict for each solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.utils import _pytree

from invlayer_core.execution.samples import to_numpy
from invlayer_core.structure import Arguments

__all__ = ["OptionRows"]


@final
@dataclass(frozen=True)
class _Slot:
    """The place of a tensor among the options."""

    number: int


@final
class OptionRows:
    """The options of every sample of a batch.

    Parameters
    ----------
    options : Arguments
        The user's, taken apart.
    tensors : sequence of Tensor
        Each ``(*batch, ...)``, one row per sample, or without dims.
    batch_dims : int
    count : int
        B.
    """

    def __init__(self, options: Arguments, tensors: Sequence[Tensor], batch_dims: int, count: int) -> None:
        self._options = options
        self._rows = [_rows(tensor, batch_dims, count) for tensor in tensors]
        slots: list[Any] = [_Slot(number) for number in range(len(tensors))]
        (self._template,) = options.unflatten(slots)
        self._constant = all(map(_is_constant, self._template.values()))
        self._plain = len(_leaves(self._template)) == len(_pytree.tree_leaves(self._template))

    def of(self, index: int) -> dict[str, Any]:
        """Those of sample ``index``: a tensor's row as float64 NumPy, or as a float."""
        if self._constant:
            return dict(self._template)
        if self._plain:  # pytrees of other kinds take ten times as long
            return dict(_filled(self._template, self._rows, index))
        slots: list[Any] = [_row(rows, index) for rows in self._rows]
        (options,) = self._options.unflatten(slots)
        return dict(options)


def _rows(tensor: Tensor, batch_dims: int, count: int) -> Any:
    """Something to be indexed by the number of the sample; or a number, which all share."""
    if tensor.ndim == 0:
        return tensor.item()
    rows = to_numpy(tensor.reshape(count, *tensor.shape[batch_dims:]))
    return rows.tolist() if rows.ndim == 1 else rows


def _row(rows: Any, index: int) -> Any:
    if isinstance(rows, list):
        return rows[index]
    return rows[index].copy() if hasattr(rows, "copy") else rows


def _is_constant(value: Any) -> bool:
    """Whether no solve can change it for another: a number, a string, or a tuple of those."""
    return type(value) in (bool, int, float, str, type(None)) or (
        type(value) is tuple and all(map(_is_constant, value))
    )


def _filled(value: Any, rows: Sequence[Any], index: int) -> Any:
    """A copy of all dicts, lists and tuples, with rows in the slots."""
    kind = type(value)
    if kind is dict:
        return {name: _filled(item, rows, index) for name, item in value.items()}
    if kind is list or kind is tuple:
        return kind([_filled(item, rows, index) for item in value])
    return _row(rows[value.number], index) if kind is _Slot else value


def _leaves(value: Any) -> list[Any]:
    if type(value) is dict:
        value = list(value.values())
    elif type(value) not in (list, tuple):
        return [value]
    return [leaf for item in value for leaf in _leaves(item)]
