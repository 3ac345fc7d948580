"""The general form: your own solver function, made differentiable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, name_of, open_arguments, read_settings, result_with_aux
from invlayer_core.compiled.function import TraceableFunction
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.execution.forward import CallableForward
from invlayer_core.implicit import solve_implicitly

__all__ = ["implicit_function"]


def implicit_function(
    conditions: Callable[..., Any],
    *,
    jacobian: Callable[..., Tensor] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make your own solver function differentiable: the general form of every problem kind.

    Parameters
    ----------
    conditions : callable
        ``F(y, *args)`` in torch, zero where ``y = solve(*args)``: a tensor or pytree of residuals.
    jacobian : callable, optional
        Your own ``∂F/∂y (y, *args) -> (*batch, n, n)``.
    **keywords
        As in :func:`root`.

    Returns
    -------
    decorator
        For ``solve(*args) -> y`` or ``-> (y, aux)``, called once on the whole batch and never
        differentiated; aux carries no gradient. y is a real or complex tensor, or a pytree of tensors. A
        plain tuple of two is (y, aux), unless ``event_dims`` has its very structure: then it is y. With
        ``return_info=True`` the decorated function returns ``(result, SolveInfo)``. Its
        ``register_fake(function)`` tells ``torch.compile`` and ``torch.export`` what y looks like:
        ``function(*args)`` gives a tensor of its shape, dtype and device.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> @inv.implicit_function(conditions=lambda y, a: y**3 - a)
    ... def cube_root(a):
    ...     return a ** (1 / 3)
    >>> a = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    >>> cube_root(a).backward()
    >>> bool((a.grad - 1 / 12).abs() < 1e-14)
    True
    """
    settings = read_settings(keywords, from_guess=False)

    def decorate(solve: Callable[..., Any]) -> Callable[..., Any]:
        traceable = TraceableFunction(conditions, jacobian, keywords, solve)

        @functools.wraps(solve)
        def differentiable(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                y = traceable.traced(args)
                return outside_graph(eager, *args) if y is None else y
            return eager(*args)

        def eager(*args: Any) -> Any:
            arguments, dtype = open_arguments(args)
            forward = CallableForward(
                solve, arguments, settings.event_dims, has_aux=True, name=name_of(solve)
            )
            solution = solve_implicitly(
                conditions, arguments, forward, arguments.tensors, settings, jacobian=jacobian
            )
            return result_with_aux(solution, dtype, settings)

        differentiable.register_fake = traceable.register_fake  # type: ignore[attr-defined]
        return differentiable

    return decorate
