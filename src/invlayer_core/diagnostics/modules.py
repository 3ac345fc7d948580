"""The modules that a callable uses: itself, what it is bound to, and what its closures and globals hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["modules_of"]

_DEPTH = 4  # functions that hold functions


def modules_of(layer: Callable[..., Any]) -> list[torch.nn.Module]:
    """Every module that ``layer`` can be seen to use, without those inside another one of them."""
    found: dict[int, torch.nn.Module] = {}
    for module in _search(layer, _DEPTH, set()):
        found.setdefault(id(module), module)
    inner = {id(child) for module in found.values() for child in module.modules() if child is not module}
    return [module for key, module in found.items() if key not in inner]


def _search(value: Any, depth: int, seen: set[int]) -> Iterator[torch.nn.Module]:
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        yield value
    for held in _held(value):
        yield from _search(held, depth - 1, seen)


def _held(value: Any) -> Iterator[Any]:
    """What a callable refers to and could call."""
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            yield from (held for held in vars(module).values() if inspect.isfunction(held))
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
    elif inspect.isfunction(value):
        names = inspect.getclosurevars(value)
        held = [*names.nonlocals.values(), *names.globals.values()]
        yield from (item for item in held if callable(item) and not inspect.isclass(item))
