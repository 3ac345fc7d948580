"""What Dynamo and ``torch.export`` trace instead of a layer's call.

Everything here is read by Dynamo, line by line: plain Python on constants, and one operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.call import CommonKeywords
from invlayer_core.compiled import operators  # noqa: F401 (registers them)
from invlayer_core.compiled.problem import module_of
from invlayer_core.compiled.template import take_out
from invlayer_core.errors import UnsupportedTransformError

__all__ = ["outside_graph", "traced_solution"]

_RAISED = (torch.float16, torch.bfloat16)

_REASON = (
    "this call of an invlayer layer cannot be part of a graph. Accepted under "
    "torch.compile(fullgraph=True) and torch.export are: RootLayer, FixedPointLayer and InverseLayer; "
    "functions decorated by implicit_function once they have a register_fake; root, fixed_point and inverse "
    "whose conditions are an nn.Module or a function without closure. Everywhere, args are tensors, "
    "constants and plain containers, there is no return_info, n_starts or warm_start, no other adjoint than "
    "Implicit, and tensors with "
    "gradients are args or parameters of the nn.Module that the conditions are (or are a method of). Without "
    "fullgraph the graph breaks here, and the numbers are the same."
)


def traced_solution(
    key: str, guesses: tuple[Tensor, ...], args: tuple[Any, ...], conditions: Any, keywords: CommonKeywords
) -> Any:
    """y* by the operator, in working precision; None if the call cannot be part of a graph."""
    tensors: list[Tensor] = []
    template = take_out(args, tensors)
    if not key or template is None or keywords.get("return_info"):
        return None
    if keywords.get("n_starts", 1) != 1 or keywords.get("warm_start") is not None:
        return None
    if not isinstance(keywords.get("adjoint") or Implicit(), Implicit):  # the others need the solver again
        return None
    if not isinstance(keywords.get("event_dims", 1), int) or any(t.is_complex() for t in tensors):
        return None
    tensors = [t.float() if t.dtype in _RAISED else t for t in (*guesses, *tensors)]
    module = module_of(conditions)
    if module is not None:
        tensors.extend(module.parameters())
    return torch.ops.invlayer.solve(key, template, torch.is_grad_enabled(), tensors)[0]


def _outside_graph(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    if torch.compiler.is_compiling():  # torch.export that runs Python instead of reading it
        raise UnsupportedTransformError(_REASON[0].upper() + _REASON[1:])
    return function(*args, **keywords)


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # from torch 2.7 on
        return torch.compiler.disable(function, reason=_REASON)
    return torch.compiler.disable(function)


outside_graph = _disabled(_outside_graph)
"""Call a function outside of any graph: torch.compile breaks the graph here, or says why it may not."""
