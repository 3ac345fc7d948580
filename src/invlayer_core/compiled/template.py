"""The args of a call as a string of constants with gaps, and the tensors that go into the gaps.

An operator of a traced graph takes tensors and plain constants. So the structure of ``args`` travels as a
Python literal in which ``...`` marks a tensor: ``({'rate': ..., 'order': 2}, ...)``.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["fill_in", "take_out"]


def take_out(tree: Any, tensors: list[Tensor]) -> str | None:
    """``tree`` as a literal with gaps, its tensors appended to ``tensors``; None if it holds anything else.

    Written in what Dynamo traces: no pytree registry, no state.

    Examples
    --------
    >>> import torch
    >>> take_out((torch.zeros(2), [3, "a"]), [])
    "(...,[3,'a',],)"
    """
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return "..."
    if type(tree) is tuple or type(tree) is list:
        parts = ""
        for leaf in tree:
            part = take_out(leaf, tensors)
            if part is None:
                return None
            parts += part + ","
        return f"({parts})" if type(tree) is tuple else f"[{parts}]"
    if type(tree) is dict:
        return _take_out_of_dict(tree, tensors)
    if tree is None or type(tree) in (bool, int, str):
        return repr(tree)
    if type(tree) is float and abs(tree) < float("inf"):
        return repr(tree)
    return None


def _take_out_of_dict(tree: dict[Any, Any], tensors: list[Tensor]) -> str | None:
    parts = ""
    for key, leaf in tree.items():
        part = take_out(leaf, tensors)
        if part is None or type(key) not in (str, int):
            return None
        parts += f"{key!r}:{part},"
    return "{" + parts + "}"


def fill_in(template: str, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The args again.

    Examples
    --------
    >>> import torch
    >>> fill_in("(...,[3,'a',],)", [torch.zeros(2)])
    (tensor([0., 0.]), [3, 'a'])
    """
    filled: tuple[Any, ...] = _fill(_parsed(template), iter(tensors))
    return filled


@functools.lru_cache(maxsize=256)
def _parsed(template: str) -> Any:
    return ast.literal_eval(template)


def _fill(tree: Any, supply: Iterator[Tensor]) -> Any:
    if tree is ...:
        return next(supply)
    if type(tree) in (tuple, list):
        return type(tree)(_fill(leaf, supply) for leaf in tree)
    if type(tree) is dict:
        return {key: _fill(leaf, supply) for key, leaf in tree.items()}
    return tree
