"""Function calls (``root``, ``fixed_point``, ``inverse``) inside a traced graph.

A call has no layer that could be looked up later. One is made while tracing, from what Dynamo knows to be
constant: the conditions, the solver and the keywords; equal constants share it. Where the conditions are an
``nn.Module`` it lives as long as that, and refers to it weakly. Where they are a function it is kept for good,
one for each piece of source text: the function itself may be a lambda made in the graph, and short-lived.

A function with a closure is left out: Dynamo guards on a function's code, not on what it closes over, so that
one closure would be answered by another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, final

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords
from invlayer_core.compiled.problem import FromGuess, OwnSolver, TracedProblem, module_of
from invlayer_core.compiled.reach import is_within_reach
from invlayer_core.compiled.registry import register
from invlayer_core.compiled.tracing import traced_solution
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.inverse import InverseConditions
from invlayer_core.inputs import is_real_tensor
from invlayer_core.solvers.contract import Solver

__all__ = ["traced_call"]

_Kind = Literal["root", "fixed_point", "inverse"]
_CONSTANT = ("on_failure", "atol", "rtol", "polish", "event_dims", "batch")


@final
@dataclass(eq=False)
class _Call:
    """What a call solves, without its tensors."""

    kind: _Kind
    function: Callable[[], Callable[..., Any] | None]  # a weak reference, or something like one
    solver: Any
    options: Mapping[str, Any]
    jacobian: Callable[..., Tensor] | None
    keywords: CommonKeywords
    trace_key: str = field(init=False)

    def __post_init__(self) -> None:
        self.trace_key = register(self)

    def traced_problem(self) -> TracedProblem:
        function = self.function()
        assert function is not None, "the conditions keep their calls alive"
        module, keywords = module_of(function), self.keywords
        if self.kind == "inverse":
            return OwnSolver(InverseConditions(function), None, keywords, module, self.solver)
        conditions = function if self.kind == "root" else FixedPointConditions(function)
        return FromGuess(conditions, self.jacobian, keywords, module, self.kind, self.solver, self.options)

    def fake_solution(self, *operands: Any) -> Tensor:
        first: Tensor = operands[0]
        return first


_OF_MODULES: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, _Call]] = weakref.WeakKeyDictionary()
_OF_FUNCTIONS: dict[Any, _Call] = {}


@torch.compiler.assume_constant_result
def _key_of(
    kind: _Kind, function: Any, solver: Any, options: Any, jacobian: Any, adjoint: Any, rest: Any
) -> str:
    """The key of the call, the same for equal constants; empty if gradients would be lost."""
    if not all(is_within_reach(part) for part in (function, jacobian) if part is not None):
        return ""
    same, reference = _OF_FUNCTIONS, lambda: function
    if isinstance(function, torch.nn.Module):
        same, reference = _OF_MODULES.setdefault(function, {}), weakref.ref(function)
    functions = tuple(_text_of(part) for part in (function, solver, jacobian))
    specification = (kind, functions, options, adjoint, rest)
    if specification not in same:
        given: Any = {name: value for name, value in zip(_CONSTANT, rest, strict=True) if value != "default"}
        keywords = given if adjoint is None else {**given, "adjoint": adjoint}
        same[specification] = _Call(kind, reference, solver, dict(options), jacobian, keywords)
    return same[specification].trace_key


def _text_of(part: Any) -> Any:
    """What makes a function without closure the same as another; modules are told apart elsewhere."""
    if isinstance(part, FunctionType):
        return part.__code__, id(part.__globals__)
    return None if isinstance(part, torch.nn.Module) else part


def _is_constant(function: Any) -> bool:
    """Whether Dynamo's guards tell ``function`` from every other one."""
    if not isinstance(function, FunctionType):
        return False
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars or code.co_kwonlyargcount:
        return False
    return getattr(function, "__defaults__", None) is None


def traced_call(
    kind: _Kind,
    function: Any,
    operand: Any,
    args: Any,
    solver: Any,
    options: Mapping[str, Any] | None,
    jacobian: Any,
    keywords: CommonKeywords,
) -> Any:
    """The call in a graph, or None if it cannot be part of one; ``operand`` is y0 or x."""
    solution = None
    if (
        is_real_tensor(operand)
        and isinstance(keywords.get("event_dims", 1), int)
        and (isinstance(function, torch.nn.Module) or _is_constant(function))
        and (isinstance(solver, (str, Solver)) or _is_constant(solver))
        and (jacobian is None or _is_constant(jacobian))
    ):
        rest = tuple([keywords.get(name, "default") for name in _CONSTANT])
        items = tuple((options or {}).items())
        key = _key_of(kind, function, solver, items, jacobian, keywords.get("adjoint"), rest)
        guesses = () if kind == "inverse" else (operand,)
        args = args if isinstance(args, tuple) else (args,)
        solution = traced_solution(key, guesses, args, function, keywords)
    return None if solution is None else solution.to(operand.dtype)
