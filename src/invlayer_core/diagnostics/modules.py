"""The modules that a callable uses: itself, what it is bound to, and what its closures and globals hold."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
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
        yield from (item for item in _referenced(value) if callable(item) and not inspect.isclass(item))


def _referenced(function: FunctionType) -> Iterator[Any]:
    """What a function's closure holds, and the globals that it and the functions inside it name."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield cell.cell_contents
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
