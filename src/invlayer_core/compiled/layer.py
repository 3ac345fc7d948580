"""What every layer class shares: it can stand in a traced graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords
from invlayer_core.compiled.problem import TracedProblem
from invlayer_core.compiled.reach import is_within_reach
from invlayer_core.compiled.registry import register
from invlayer_core.compiled.tracing import traced_solution
from invlayer_core.inputs import is_real_tensor

__all__ = ["Layer"]


class Layer(torch.nn.Module, ABC):
    """An implicit layer: its conditions, and how they are solved.

    Attributes
    ----------
    keywords : CommonKeywords
    trace_key : str
        By which a traced graph finds the layer; empty if it cannot stand in one. Never shared by copies.
    """

    keywords: CommonKeywords
    trace_key: str

    @abstractmethod
    def traced_problem(self) -> TracedProblem:
        """The problem without its tensors."""

    @abstractmethod
    def _differentiated(self) -> Sequence[Callable[..., Any] | None]:
        """The functions that derivatives come from, those of the module's parameters first."""

    def _draw_key(self) -> None:
        functions = [function for function in self._differentiated() if function is not None]
        self.trace_key = register(self) if all(map(is_within_reach, functions)) else ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._draw_key()

    def fake_solution(self, *operands: Any) -> Tensor:
        """A tensor of the form of y: that of the first operand, which is y0 or x."""
        first: Tensor = operands[0]
        return first

    def _traced(self, like: Any, guesses: tuple[Tensor, ...], args: tuple[Any, ...]) -> Any:
        """The call in a graph; None if it cannot be part of one."""
        if not (is_real_tensor(like) and isinstance(self.keywords.get("event_dims", 1), int)):
            return None
        source = next(function for function in self._differentiated() if function is not None)
        solution = traced_solution(self.trace_key, guesses, args, source, self.keywords)
        return None if solution is None else solution.to(like.dtype)
