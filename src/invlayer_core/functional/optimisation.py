"""Minimisation and least squares as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, SolverLike, solve_from_guess
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.charted import Charted, ChartedJacobian
from invlayer_core.conditions.stationarity import HalfSquares, StationarityConditions
from invlayer_core.errors import ConditionsError
from invlayer_core.functional.on_manifold import solve_on_manifold, with_objective
from invlayer_core.functional.unknowns import Packed, Unknowns
from invlayer_core.losses import Robust
from invlayer_core.manifolds.atlas import Atlas

__all__ = ["least_squares", "minimize"]


def minimize(
    objective: Callable[..., Tensor],
    y0: Any,
    args: Any = (),
    *,
    solver: SolverLike = "torch.lbfgs",
    options: Mapping[str, Any] | None = None,
    hessian: Callable[..., Tensor] | None = None,
    manifold: Any = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Find a local minimum y of ``objective(y, *args)``, and differentiate it.

    The conditions are ∇f = 0, so that the derivative is −(∇²f)⁻¹ ∂(∇f)/∂θ with the full Hessian.

    Parameters
    ----------
    objective : callable
        ``objective(y, *args) -> (*batch,)`` in torch, twice differentiable: one number per sample.
    y0 : Tensor of shape ``(*batch, n)``, or a pytree of tensors
        Where the solver starts; its structure and shape are those of y.
    args : tuple of pytrees, or one tensor
        What the objective depends on besides y.
    solver : str, Solver or callable
        A registered name for the kind ``"minimize"``, or any function ``solver(y0, *args) -> y``.
    options : mapping, optional
        The solver's own options.
    hessian : callable, optional
        Your own ``∇²f (y, *args) -> (*batch, n, n)``, if it is faster than autograd.
    manifold : Manifold, or a pytree of them like y0, optional
        Where the unknowns live, if that is no vector space: :class:`~invlayer_core.manifolds.SE3`, ... Then
        solver, gradient and Hessian work in the coordinates of charts; y and y0 are points.
    **keywords
        As in :func:`invlayer_core.root`. What is measured, and compared with ``atol``, is ‖∇f‖∞.

    Returns
    -------
    y like y0; ``(y, SolveInfo)`` with ``return_info=True``

    Raises
    ------
    ConvergenceError, ConditionsError, SolverNotFoundError
        As :func:`invlayer_core.root`.
    SingularJacobianError
        At the derivative, where the Hessian is singular: a flat minimum.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> a = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    >>> closed_form = lambda y0, a: a.log()
    >>> y = inv.minimize(lambda y, a: (y.exp() - a * y).sum(-1), torch.zeros_like(a), a, solver=closed_form)
    >>> y.backward()
    >>> bool((a.grad - 1 / 3).abs() < 1e-14)
    True
    """
    if torch.compiler.is_compiling():
        return outside_graph(_minimize, objective, y0, args, solver, options, hessian, manifold, keywords)
    return _minimize(objective, y0, args, solver, options, hessian, manifold, keywords)


def least_squares(
    residuals: Callable[..., Any],
    y0: Any,
    args: Any = (),
    *,
    solver: SolverLike = "torch.levenberg_marquardt",
    options: Mapping[str, Any] | None = None,
    jacobian: Callable[..., Tensor] | None = None,
    hessian: Callable[..., Tensor] | None = None,
    loss: Any = None,
    manifold: Any = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Find y that minimises ½‖r‖² of ``residuals(y, *args)``, and differentiate it.

    The conditions are Jᵀr = 0. Their Jacobian is the *full* Hessian JᵀJ + Σ rᵢ ∇²rᵢ: the Gauss–Newton
    stand-in JᵀJ would be wrong wherever residuals remain.

    Parameters
    ----------
    residuals : callable
        ``residuals(y, *args) -> (*batch, m)`` in torch, or a pytree of ``(*batch, ...)``.
    y0, args, solver, options
        As in :func:`minimize`; the kind is ``"least_squares"``.
    jacobian : callable, optional
        Your own ``∂r/∂y (y, *args) -> (*batch, m, n)`` for the solver; on a manifold by δ, at δ = 0 in the
        chart at y. :func:`invlayer_core.check_jacobian` compares it with autograd's.
    hessian : callable, optional
        Your own full Hessian ``(y, *args) -> (*batch, n, n)`` for the derivative.
    loss : Loss, or a pytree of them like the residuals, optional
        What a residual costs that may be an outlier: ½ Σ ρ(rᵢ²) is minimised. See
        :mod:`invlayer_core.losses`.
    manifold : Manifold, or a pytree of them like y0, optional
        As in :func:`minimize`.
    **keywords
        As in :func:`minimize`.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> data = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    >>> mean = lambda y0, data: data.mean(-1, keepdim=True)
    >>> y0 = torch.zeros(1, dtype=torch.float64)
    >>> y = inv.least_squares(lambda y, data: y - data, y0, data, solver=mean)
    >>> y.backward()
    >>> bool((data.grad - 1 / 3).abs().max() < 1e-14)
    True
    """
    if torch.compiler.is_compiling():
        return outside_graph(
            _least_squares, residuals, y0, args, solver, options, jacobian, hessian, loss, manifold, keywords
        )
    return _least_squares(residuals, y0, args, solver, options, jacobian, hessian, loss, manifold, keywords)


def _least_squares(
    residuals: Callable[..., Any],
    y0: Any,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    jacobian: Callable[..., Tensor] | None,
    hessian: Callable[..., Tensor] | None,
    loss: Any,
    manifold: Any,
    keywords: CommonKeywords,
) -> Any:
    if loss is not None:
        residuals = Robust(residuals, loss)
        _refuse_jacobian(jacobian)
    if manifold is not None:
        _refuse_hessian("least_squares", hessian)

        def in_charts(atlas: Atlas) -> HalfSquares:
            given = None if jacobian is None else ChartedJacobian(jacobian, atlas)
            return HalfSquares(Packed(Charted(residuals, atlas)), given)

        return solve_on_manifold("least_squares", in_charts, y0, args, manifold, solver, options, keywords)
    unknowns = Unknowns.of("least_squares", y0, args, keywords)
    given = None if jacobian is None else unknowns.function(jacobian)
    objective = HalfSquares(unknowns.packed(residuals), given)
    return _solve("least_squares", objective, unknowns, args, solver, options, hessian, keywords)


def _minimize(
    objective: Callable[..., Tensor],
    y0: Any,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    hessian: Callable[..., Tensor] | None,
    manifold: Any,
    keywords: CommonKeywords,
) -> Any:
    if manifold is not None:
        _refuse_hessian("minimize", hessian)
        in_charts = lambda atlas: Charted(objective, atlas)  # noqa: E731
        return solve_on_manifold("minimize", in_charts, y0, args, manifold, solver, options, keywords)
    unknowns = Unknowns.of("minimize", y0, args, keywords)
    return _solve(
        "minimize", unknowns.function(objective), unknowns, args, solver, options, hessian, keywords
    )


def _refuse_jacobian(jacobian: Callable[..., Tensor] | None) -> None:
    if jacobian is not None:
        raise ConditionsError(
            "least_squares(jacobian=..., loss=...): the solver works on residuals that the loss has made, "
            "and whose Jacobian is another. Leave jacobian out, and autograd takes it."
        )


def _refuse_hessian(kind: str, hessian: Callable[..., Tensor] | None) -> None:
    if hessian is not None:
        raise ConditionsError(
            f"{kind}(hessian=..., manifold=...): second derivatives by y are none by the coordinates of a "
            "chart. Leave hessian out, and autograd takes it."
        )


def _solve(
    kind: str,
    objective: Callable[..., Tensor],
    unknowns: Unknowns,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    hessian: Callable[..., Tensor] | None,
    keywords: CommonKeywords,
) -> Any:
    """Both kinds, for unknowns that are a vector per sample."""
    solution = solve_from_guess(
        kind,
        StationarityConditions(objective),
        unknowns.vector,
        args,
        unknowns.solver(solver),
        options,
        None if hessian is None else unknowns.function(hessian),
        unknowns.keywords(kind, keywords),
    )
    if keywords.get("return_info"):
        vector, info = solution
        return unknowns.restore(vector), with_objective(info, objective, vector, args)
    return unknowns.restore(solution)
