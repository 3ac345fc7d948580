"""The inverse of a known function, as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, name_of, open_arguments, read_settings, result
from invlayer_core.compiled.calls import traced_call
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.inverse import ConstantJacobian, DeclaredJacobianConditions, InverseConditions
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import CallableForward
from invlayer_core.implicit import solve_implicitly
from invlayer_core.inputs import is_real_tensor, working_precision
from invlayer_core.leaves import check_tensors
from invlayer_core.structure import Arguments

__all__ = ["inverse", "inverse_conditions"]


def inverse(
    x: Any,
    g: Callable[[Any], Any],
    *,
    f: Callable[[Any], Any] | None = None,
    jacobian: Tensor | Callable[[Tensor], Tensor] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """y = g(x) for an opaque g, differentiated through its inverse f: f(g(x)) = x.

    By the inverse function theorem ∂g/∂x = (∂f/∂y)⁻¹ at y = g(x) (Krantz & Parks 2002). g runs once.

    Parameters
    ----------
    x : Tensor of shape ``(*batch, n)``, real or complex, or a pytree of tensors
    g : callable
        ``g(x) -> y``, a tensor or pytree; never differentiated. Wrap a NumPy function with
        ``inv.from_numpy``.
    f : callable
        The inverse of g, in torch: y in, x in its structure out. Derivatives of every order, also for what
        f captures.
    jacobian : Tensor ``(*batch, n, n)`` or callable, instead of f
        ∂f/∂y at y = g(x). As a constant tensor it gives first derivatives; a second one raises. As a
        torch function of y it gives every order. Without f nothing can be measured, and the status is
        ``UNVERIFIED``.
    **keywords
        As in :func:`root`.

    Raises
    ------
    ConditionsError
        If not exactly one of ``f`` and ``jacobian`` is given; or, at the derivative, if f maps m unknowns
        to n ≠ m values: then only ``adjoint=Implicit(singular="lstsq")`` has an answer, ∂y = J⁺ ∂x.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    >>> y = inv.inverse(x, torch.asin, f=torch.sin)
    >>> y.backward()
    >>> bool((x.grad - 1 / (1 - 0.25) ** 0.5).abs() < 1e-14)
    True
    """
    if torch.compiler.is_compiling():
        y = (
            None
            if f is None or jacobian is not None
            else traced_call("inverse", f, x, (x,), g, None, None, keywords)
        )
        return outside_graph(_inverse, x, g, f, jacobian, keywords) if y is None else y
    return _inverse(x, g, f, jacobian, keywords)


def _inverse(
    x: Any,
    g: Callable[[Any], Any],
    f: Callable[[Any], Any] | None,
    jacobian: Tensor | Callable[[Tensor], Tensor] | None,
    keywords: CommonKeywords,
) -> Any:
    if (f is None) == (jacobian is None):
        came = "neither f= nor jacobian=" if f is None else "both f= and jacobian="
        raise ConditionsError(
            f"inverse(x, g, ...): got {came}; accepted is exactly one of them: the inverse f of g as a torch "
            "function, or its Jacobian at y = g(x)."
        )
    settings = read_settings(keywords, from_guess=False)
    if is_real_tensor(x):
        arguments, dtype = Arguments.flatten((working_precision(x),)), x.dtype
    else:
        check_tensors("inverse", "x", x)
        arguments, dtype = open_arguments((x,))
    forward = CallableForward(g, arguments, settings.event_dims, name=name_of(g))
    conditions, block_function = inverse_conditions(f, jacobian)
    solution = solve_implicitly(
        conditions, arguments, forward, arguments.tensors, settings,
        jacobian=block_function, measurable=f is not None,
    )  # fmt: skip
    return result(solution, dtype, settings)


def inverse_conditions(
    f: Callable[[Any], Any] | None, jacobian: Tensor | Callable[[Tensor], Tensor] | None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
    """F(y, x) = f(y) − x and its Jacobian, from what the user knows of f."""
    if f is not None:
        return InverseConditions(f), None
    block_function = ConstantJacobian(jacobian.detach()) if isinstance(jacobian, Tensor) else jacobian
    assert block_function is not None
    return DeclaredJacobianConditions(block_function), lambda y, _x: block_function(y)
