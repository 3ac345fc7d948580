"""Minimisation, least squares and constrained problems as layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack, cast, final

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, SolverLike
from invlayer_core.conditions.kkt import Activity
from invlayer_core.functional.optimisation import least_squares, minimize
from invlayer_core.functional.program import nlp

__all__ = ["LeastSquaresLayer", "MinimizeLayer", "NLPLayer"]


def _merged(own: CommonKeywords, given: CommonKeywords) -> CommonKeywords:
    """The layer's keywords, with those of a call in their place."""
    return cast(CommonKeywords, {**own, **given})


@final
class MinimizeLayer(torch.nn.Module):
    """``layer(*args, y0=...)`` minimises ``objective(y, *args)``; see :func:`invlayer_core.minimize`.

    If the objective is an ``nn.Module``, its parameters are the layer's own. A keyword given to a call, such
    as ``adjoint=``, takes the place of the layer's own for that call.

    Parameters
    ----------
    objective, solver, options, hessian, manifold, **keywords
        As in :func:`invlayer_core.minimize`.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> layer = inv.MinimizeLayer(lambda y, a: (y.exp() - a * y).sum(-1), solver=lambda y0, a: a.log())
    >>> layer(torch.tensor([1.0]), y0=torch.zeros(1))
    tensor([0.])
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        *,
        solver: SolverLike = "torch.lbfgs",
        options: Mapping[str, Any] | None = None,
        hessian: Callable[..., Tensor] | None = None,
        manifold: Any = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.objective, self.solver, self.options, self.hessian = objective, solver, options, hessian
        self.manifold, self.keywords = manifold, keywords

    def forward(self, *args: Any, y0: Any, **keywords: Unpack[CommonKeywords]) -> Any:
        return minimize(
            self.objective,
            y0,
            args,
            solver=self.solver,
            options=self.options,
            hessian=self.hessian,
            manifold=self.manifold,
            **_merged(self.keywords, keywords),
        )


@final
class LeastSquaresLayer(torch.nn.Module):
    """``layer(*args, y0=...)`` minimises ½‖r‖² of the residuals; see :func:`invlayer_core.least_squares`.

    Parameters
    ----------
    residuals, solver, options, jacobian, hessian, loss, manifold, **keywords
        As in :func:`invlayer_core.least_squares`; keywords per call as in :class:`MinimizeLayer`.
    """

    def __init__(
        self,
        residuals: Callable[..., Any],
        *,
        solver: SolverLike = "torch.levenberg_marquardt",
        options: Mapping[str, Any] | None = None,
        jacobian: Callable[..., Tensor] | None = None,
        hessian: Callable[..., Tensor] | None = None,
        loss: Any = None,
        manifold: Any = None,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.residuals, self.solver, self.options = residuals, solver, options
        self.jacobian, self.hessian, self.loss, self.manifold = jacobian, hessian, loss, manifold
        self.keywords = keywords

    def forward(self, *args: Any, y0: Any, **keywords: Unpack[CommonKeywords]) -> Any:
        return least_squares(
            self.residuals,
            y0,
            args,
            solver=self.solver,
            options=self.options,
            jacobian=self.jacobian,
            hessian=self.hessian,
            loss=self.loss,
            manifold=self.manifold,
            **_merged(self.keywords, keywords),
        )


@final
class NLPLayer(torch.nn.Module):
    """``layer(*args, y0=..., bounds=...)`` minimises under constraints; see :func:`invlayer_core.nlp`.

    Parameters
    ----------
    objective, eq, ineq, bounds, solver, options, activity, return_multipliers, **keywords
        As in :func:`invlayer_core.nlp`; keywords per call as in :class:`MinimizeLayer`. Bounds that carry
        gradients are given to the call.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        *,
        eq: Callable[..., Any] | None = None,
        ineq: Callable[..., Any] | None = None,
        bounds: tuple[Any, Any] | None = None,
        solver: SolverLike = "scipy.minimize",
        options: Mapping[str, Any] | None = None,
        activity: Activity = "exact",
        return_multipliers: bool = False,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.objective, self.eq, self.ineq, self.bounds = objective, eq, ineq, bounds
        self.solver, self.options, self.activity = solver, options, activity
        self.return_multipliers, self.keywords = return_multipliers, keywords

    def forward(
        self,
        *args: Any,
        y0: Any,
        bounds: tuple[Any, Any] | None = None,
        **keywords: Unpack[CommonKeywords],
    ) -> Any:
        return nlp(
            self.objective,
            y0,
            args,
            eq=self.eq,
            ineq=self.ineq,
            bounds=self.bounds if bounds is None else bounds,
            solver=self.solver,
            options=self.options,
            activity=self.activity,
            return_multipliers=self.return_multipliers,
            **_merged(self.keywords, keywords),
        )
