"""Root finding and fixed points as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, SolverLike, solve_from_guess
from invlayer_core.compiled.calls import traced_call
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.root import root_conditions

__all__ = ["fixed_point", "root"]


def root(
    f: Callable[..., Any],
    y0: Any,
    args: Any = (),
    *,
    solver: SolverLike = "torch.newton",
    options: Mapping[str, Any] | None = None,
    jacobian: Callable[..., Tensor] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Solve ``f(y, *args)`` = 0, and differentiate y with respect to args and to what f captures.

    Parameters
    ----------
    f : callable
        ``f(y, *args)`` in torch, ``(*batch, n) -> (*batch, n)``: a function, closure, bound method or
        ``nn.Module``. Every sample must be treated alone. For a pytree y it gets that structure, and
        returns a tensor or pytree of as many equations.
    y0 : Tensor of shape ``(*batch, n)``, real or complex, or a pytree of tensors ``(*batch, *event)``
        Where the solver starts; its shape is that of y. No gradient flows to it. Or a function
        ``y0(*args)`` that makes such a guess. With ``n_starts=k``, k of them one after the other:
        ``(k, *batch, n)``.
    args : tuple of pytrees, or one tensor
        What f depends on besides y; batched or not, as f itself broadcasts.
    solver : str, Solver or callable
        A registered name (:func:`invlayer_core.solvers` lists them), a ``Solver``, or any function
        ``solver(y0, *args) -> y``.
    options : mapping, optional
        The solver's own options, unchanged.
    jacobian : callable, optional
        Your own ``∂f/∂y (y, *args) -> (*batch, n, n)`` in torch, if it is faster than autograd; for real y.
    **keywords
        ``on_failure, atol, rtol, polish, event_dims, adjoint, batch, executor, timeout, progress,
        return_info, compile, n_starts, warm_start``: see ``Settings``.

    Returns
    -------
    Tensor of shape ``(*batch, n)``, or a pytree like y0; ``(y, SolveInfo)`` with ``return_info=True``

    Raises
    ------
    ConvergenceError
        If a sample misses its tolerance by our own measurement, unless ``on_failure`` says otherwise.
    ConditionsError
        If shapes, structures, dtypes or devices do not fit.
    SolverNotFoundError, SolverLoadError, SolverConflictError
        If ``solver`` names none that can be used.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    >>> y = inv.root(lambda y, a: y**2 - a, torch.ones(1, dtype=torch.float64), args=a)
    >>> y.backward()
    >>> bool((a.grad - 0.5 / 2**0.5).abs() < 1e-12)
    True
    """
    conditions = root_conditions(f)
    if torch.compiler.is_compiling():
        y = traced_call("root", f, y0, args, solver, options, jacobian, keywords)
        if y is not None:
            return y
        return outside_graph(
            solve_from_guess, "root", conditions, y0, args, solver, options, jacobian, keywords
        )
    return solve_from_guess("root", conditions, y0, args, solver, options, jacobian, keywords)


def fixed_point(
    T: Callable[..., Any],
    y0: Any,
    args: Any = (),
    *,
    solver: SolverLike = "torch.newton",
    options: Mapping[str, Any] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Find y = ``T(y, *args)``, and differentiate it with respect to args and to what T captures.

    Parameters, results and errors are those of :func:`root`, whose conditions here are ``T(y, *args)`` − y.
    For a pytree y, T returns the same structure.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> y = inv.fixed_point(lambda y: torch.cos(y), torch.ones(1, dtype=torch.float64))
    >>> bool((y - 0.7390851332151607).abs() < 1e-14)
    True
    """
    if torch.compiler.is_compiling():
        y = traced_call("fixed_point", T, y0, args, solver, options, None, keywords)
        return outside_graph(_fixed_point, T, y0, args, solver, options, keywords) if y is None else y
    return _fixed_point(T, y0, args, solver, options, keywords)


def _fixed_point(
    T: Callable[..., Any],
    y0: Any,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    keywords: CommonKeywords,
) -> Any:
    return solve_from_guess("fixed_point", FixedPointConditions(T), y0, args, solver, options, None, keywords)
