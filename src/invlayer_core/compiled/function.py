"""A decorated solver function (``implicit_function``) inside a traced graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from invlayer_core.call import CommonKeywords
from invlayer_core.compiled.problem import OwnSolver, TracedProblem, module_of
from invlayer_core.compiled.reach import is_within_reach
from invlayer_core.compiled.registry import register
from invlayer_core.compiled.tracing import traced_solution

__all__ = ["TraceableFunction"]


@final
class TraceableFunction:
    """A solver function with its conditions; part of a graph once it is known what its result looks like."""

    def __init__(
        self,
        conditions: Callable[..., Tensor],
        jacobian: Callable[..., Tensor] | None,
        keywords: CommonKeywords,
        solve: Callable[..., Any],
    ) -> None:
        self.conditions, self.jacobian, self.keywords, self.solve = conditions, jacobian, keywords, solve
        self.fake: Callable[..., Tensor] | None = None
        self.trace_key = ""

    def register_fake(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Tell what y looks like: ``function(*args)`` has its shape, dtype and device. Usable as a decorator."""
        self.fake = function
        parts = (part for part in (self.conditions, self.jacobian) if part is not None)
        self.trace_key = register(self) if all(map(is_within_reach, parts)) else ""
        return function

    def traced(self, args: tuple[Any, ...]) -> Any:
        """The call in a graph; None if it cannot be part of one."""
        y = traced_solution(self.trace_key, (), args, self.conditions, self.keywords)
        if y is None:
            return None
        for arg in args:
            if isinstance(arg, Tensor) and arg.is_floating_point():
                return y.to(arg.dtype)
        return y

    def traced_problem(self) -> TracedProblem:
        return OwnSolver(
            self.conditions, self.jacobian, self.keywords, module_of(self.conditions), self.solve
        )

    def fake_solution(self, *operands: Any) -> Tensor:
        assert self.fake is not None
        return self.fake(*operands)
