"""The inverse of a known function, as a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack, final

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords
from invlayer_core.compiled.layer import Layer
from invlayer_core.compiled.problem import OwnSolver, TracedProblem, module_of
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.functional.inverse import inverse, inverse_conditions

__all__ = ["InverseLayer"]


@final
class InverseLayer(Layer):
    """``layer(x)`` is g(x), differentiated through its inverse f; see :func:`invlayer_core.inverse`.

    Parameters
    ----------
    g, f, **keywords
        As in :func:`invlayer_core.inverse`.
    jacobian : callable, optional
        ∂f/∂y as a torch function of y, instead of f.
    """

    def __init__(
        self,
        g: Callable[[Any], Any],
        *,
        f: Callable[[Any], Any] | None = None,
        jacobian: Callable[[Tensor], Tensor] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.g, self.f, self.jacobian, self.keywords = g, f, jacobian, keywords
        self._draw_key()

    def forward(self, x: Any) -> Any:
        if torch.compiler.is_compiling():
            y = self._traced(x, (), (x,))
            return outside_graph(self._solve, x) if y is None else y
        return self._solve(x)

    def _solve(self, x: Any) -> Any:
        return inverse(x, self.g, f=self.f, jacobian=self.jacobian, **self.keywords)

    def _differentiated(self) -> Sequence[Callable[..., Any] | None]:
        return self.f, self.jacobian

    def traced_problem(self) -> TracedProblem:
        conditions, block_function = inverse_conditions(self.f, self.jacobian)
        module = module_of(self.f if self.jacobian is None else self.jacobian)
        return OwnSolver(
            conditions, block_function, self.keywords, module, self.g, measurable=self.f is not None
        )
