"""Whether a function depends on tensors with gradients that a traced graph would not see.

An operator has as inputs what is passed to it: args, and the parameters of a module. What else the conditions
can reach, through a closure, a default, a global name or an attribute, is looked through here, once per layer.
The look is shallow where Python is opaque; then the operator itself finds out when it runs, and raises.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from invlayer_core.compiled.problem import module_of

__all__ = ["is_within_reach"]


def is_within_reach(function: Any) -> bool:
    """Whether the parameters of the module that ``function`` is (or is a method of) are all it depends on.

    Examples
    --------
    >>> import torch
    >>> weight = torch.ones(2, requires_grad=True)
    >>> is_within_reach(lambda y, a: y - a), is_within_reach(lambda y: weight * y)
    (True, False)
    >>> is_within_reach(torch.nn.Linear(2, 2))
    True
    """
    module = module_of(function)
    if isinstance(module, torch.jit.ScriptModule):
        return False
    known = {id(module)} | ({id(p) for p in module.parameters()} if module is not None else set())
    return not any(_carries_gradient(value) for value in _reachable(function, known))


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, torch.nn.Module) and next(value.parameters(), None) is not None


def _reachable(value: Any, seen: set[int]) -> Iterator[Any]:
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    for inner in _inside(value):
        yield from _reachable(inner, seen)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, FunctionType):
        yield from _inside_function(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif type(value) in (tuple, list):
        yield from value
    elif type(value) is dict:
        yield from value.values()
    elif not isinstance(value, (type, Tensor, torch.nn.Module, ModuleType)):
        yield from getattr(value, "__dict__", {}).values()


def _inside_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet bound
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (Tensor, torch.nn.Module, FunctionType)) and not _is_of_torch(value):
            yield value


def _is_of_torch(value: Any) -> bool:
    return isinstance(value, FunctionType) and str(value.__module__).partition(".")[0] == "torch"
