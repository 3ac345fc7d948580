"""The problem kinds as ``nn.Module`` layers: settings once, tensors per call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, SolverLike
from invlayer_core.functional import fixed_point, inverse, root

__all__ = ["FixedPointLayer", "InverseLayer", "RootLayer"]


@final
class RootLayer(torch.nn.Module):
    """``layer(*args, y0=...)`` solves ``f(y, *args)`` = 0; see :func:`invlayer_core.root`.

    If f is an ``nn.Module``, its parameters are the layer's own.

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
        f: Callable[..., Tensor],
        *,
        solver: SolverLike = "torch.newton",
        options: Mapping[str, Any] | None = None,
        jacobian: Callable[..., Tensor] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.f, self.solver, self.options, self.jacobian = f, solver, options, jacobian
        self.keywords = keywords

    def forward(self, *args: Any, y0: Tensor) -> Any:
        return root(
            self.f,
            y0,
            args,
            solver=self.solver,
            options=self.options,
            jacobian=self.jacobian,
            **self.keywords,
        )


@final
class FixedPointLayer(torch.nn.Module):
    """``layer(*args, y0=...)`` finds y = ``T(y, *args)``; see :func:`invlayer_core.fixed_point`.

    Parameters
    ----------
    T, solver, options, **keywords
        As in :func:`invlayer_core.fixed_point`.
    """

    def __init__(
        self,
        T: Callable[..., Tensor],
        *,
        solver: SolverLike = "torch.newton",
        options: Mapping[str, Any] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.T, self.solver, self.options, self.keywords = T, solver, options, keywords

    def forward(self, *args: Any, y0: Tensor) -> Any:
        return fixed_point(self.T, y0, args, solver=self.solver, options=self.options, **self.keywords)


@final
class InverseLayer(torch.nn.Module):
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
        g: Callable[[Tensor], Tensor],
        *,
        f: Callable[[Tensor], Tensor] | None = None,
        jacobian: Callable[[Tensor], Tensor] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.g, self.f, self.jacobian, self.keywords = g, f, jacobian, keywords

    def forward(self, x: Tensor) -> Any:
        return inverse(x, self.g, f=self.f, jacobian=self.jacobian, **self.keywords)
