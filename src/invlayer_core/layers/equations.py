"""Root finding and fixed points as layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, final

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, SolverLike
from invlayer_core.certificate import SolveInfo
from invlayer_core.compiled.layer import Layer
from invlayer_core.compiled.problem import FromGuess, TracedProblem, module_of
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.functional.equations import fixed_point, root

__all__ = ["FixedPointLayer", "RootLayer"]


@final
class RootLayer(Layer):
    """``layer(*args, y0=...)`` solves ``f(y, *args)`` = 0; see :func:`invlayer_core.root`.

    If f is an ``nn.Module``, its parameters are the layer's own. ``y0``, and with it y, is a tensor or
    a pytree of tensors; or it is a function that makes one of the args. ``layer(*args, y0=...,
    warm_start=(y, info))`` starts from an earlier solution.

    Parameters
    ----------
    f, solver, options, jacobian, **keywords
        As in :func:`invlayer_core.root`.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> layer = inv.RootLayer(lambda y, a: y**2 - a)
    >>> bool((layer(torch.tensor([4.0]), y0=torch.ones(1)) - 2).abs() < 1e-6)
    True
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        solver: SolverLike = "torch.newton",
        options: Mapping[str, Any] | None = None,
        jacobian: Callable[..., Tensor] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.f, self.solver, self.options, self.jacobian = f, solver, options, jacobian
        self.keywords = keywords
        self._draw_key()

    def forward(self, *args: Any, y0: Any, warm_start: tuple[Any, SolveInfo] | None = None) -> Any:
        if torch.compiler.is_compiling():
            y = self._traced(y0, (y0,), args) if warm_start is None else None
            return outside_graph(self._solve, y0, warm_start, *args) if y is None else y
        return self._solve(y0, warm_start, *args)

    def _solve(self, y0: Any, warm_start: tuple[Any, SolveInfo] | None, *args: Any) -> Any:
        keywords: CommonKeywords = self.keywords
        if warm_start is not None:
            keywords = {**keywords, "warm_start": warm_start}
        return root(
            self.f,
            y0,
            args,
            solver=self.solver,
            options=self.options,
            jacobian=self.jacobian,
            **keywords,
        )

    def _differentiated(self) -> Sequence[Callable[..., Any] | None]:
        return self.f, self.jacobian

    def traced_problem(self) -> TracedProblem:
        return FromGuess(
            self.f, self.jacobian, self.keywords, module_of(self.f), "root", self.solver, self.options
        )


@final
class FixedPointLayer(Layer):
    """``layer(*args, y0=...)`` finds y = ``T(y, *args)``; see :func:`invlayer_core.fixed_point`.

    Parameters
    ----------
    T, solver, options, **keywords
        As in :func:`invlayer_core.fixed_point`.
    """

    def __init__(
        self,
        T: Callable[..., Any],
        *,
        solver: SolverLike = "torch.newton",
        options: Mapping[str, Any] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.T, self.solver, self.options, self.keywords = T, solver, options, keywords
        self._draw_key()

    def forward(self, *args: Any, y0: Any, warm_start: tuple[Any, SolveInfo] | None = None) -> Any:
        if torch.compiler.is_compiling():
            y = self._traced(y0, (y0,), args) if warm_start is None else None
            return outside_graph(self._solve, y0, warm_start, *args) if y is None else y
        return self._solve(y0, warm_start, *args)

    def _solve(self, y0: Any, warm_start: tuple[Any, SolveInfo] | None, *args: Any) -> Any:
        keywords: CommonKeywords = self.keywords
        if warm_start is not None:
            keywords = {**keywords, "warm_start": warm_start}
        return fixed_point(self.T, y0, args, solver=self.solver, options=self.options, **keywords)

    def _differentiated(self) -> Sequence[Callable[..., Any] | None]:
        return (self.T,)

    def traced_problem(self) -> TracedProblem:
        return FromGuess(
            FixedPointConditions(self.T), None, self.keywords, module_of(self.T),
            "fixed_point", self.solver, self.options,
        )  # fmt: skip
