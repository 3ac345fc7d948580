"""The problem kinds as functions: each builds its conditions and hands them to the spine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from invlayer_core.call import (
    CommonKeywords,
    SolverLike,
    name_of,
    open_arguments,
    read_settings,
    result,
    result_with_aux,
    solve_from_guess,
)
from invlayer_core.compiled.calls import traced_call
from invlayer_core.compiled.function import TraceableFunction
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.inverse import ConstantJacobian, DeclaredJacobianConditions, InverseConditions
from invlayer_core.conditions.root import root_conditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import CallableForward
from invlayer_core.implicit import solve_implicitly
from invlayer_core.inputs import check_unknown, is_real_tensor
from invlayer_core.jacobians.blocks import full_jacobian_blocks
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.leaves import check_tensors
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["batch_jacobian", "fixed_point", "implicit_function", "inverse", "root"]


def root(
    f: Callable[..., Tensor],
    y0: Tensor,
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
        ``nn.Module``. Every sample must be treated alone.
    y0 : Tensor of shape ``(*batch, n)``
        Where the solver starts; its shape is that of y. No gradient flows to it.
    args : tuple of pytrees, or one tensor
        What f depends on besides y; batched or not, as f itself broadcasts.
    solver : str, Solver or callable
        A registered name (:func:`invlayer_core.solvers` lists them), a ``Solver``, or any function
        ``solver(y0, *args) -> y``.
    options : mapping, optional
        The solver's own options, unchanged.
    jacobian : callable, optional
        Your own ``∂f/∂y (y, *args) -> (*batch, n, n)`` in torch, if it is faster than autograd.
    **keywords
        ``on_failure, atol, rtol, polish, event_dims, adjoint, batch, executor, timeout, progress,
        return_info``: see ``Settings``.

    Returns
    -------
    Tensor of shape ``(*batch, n)``, or ``(Tensor, SolveInfo)`` with ``return_info=True``

    Raises
    ------
    ConvergenceError
        If a sample misses its tolerance by our own measurement, unless ``on_failure`` says otherwise.
    ConditionsError
        If shapes, dtypes or devices do not fit.
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
    T: Callable[..., Tensor],
    y0: Tensor,
    args: Any = (),
    *,
    solver: SolverLike = "torch.newton",
    options: Mapping[str, Any] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Find y = ``T(y, *args)``, and differentiate it with respect to args and to what T captures.

    Parameters, results and errors are those of :func:`root`, whose conditions here are ``T(y, *args)`` − y.

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
    T: Callable[..., Tensor],
    y0: Tensor,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    keywords: CommonKeywords,
) -> Any:
    return solve_from_guess("fixed_point", FixedPointConditions(T), y0, args, solver, options, None, keywords)


def inverse(
    x: Tensor,
    g: Callable[[Tensor], Tensor],
    *,
    f: Callable[[Tensor], Tensor] | None = None,
    jacobian: Tensor | Callable[[Tensor], Tensor] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """y = g(x) for an opaque g, differentiated through its inverse f: f(g(x)) = x.

    By the inverse function theorem ∂g/∂x = (∂f/∂y)⁻¹ at y = g(x) (Krantz & Parks 2002). g runs once.

    Parameters
    ----------
    x : Tensor of shape ``(*batch, n)``
    g : callable
        ``g(x) -> y``; never differentiated. Wrap a NumPy function with ``inv.from_numpy``.
    f : callable
        The inverse of g, in torch. Derivatives of every order, also for what f captures.
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
    x: Tensor,
    g: Callable[[Tensor], Tensor],
    f: Callable[[Tensor], Tensor] | None,
    jacobian: Tensor | Callable[[Tensor], Tensor] | None,
    keywords: CommonKeywords,
) -> Any:
    if not is_real_tensor(x):
        check_tensors("inverse", "x", x)
    if (f is None) == (jacobian is None):
        came = "neither f= nor jacobian=" if f is None else "both f= and jacobian="
        raise ConditionsError(
            f"inverse(x, g, ...): got {came}; accepted is exactly one of them: the inverse f of g as a torch "
            "function, or its Jacobian at y = g(x)."
        )
    settings = read_settings(keywords)
    arguments, dtype = open_arguments((x,))
    forward = CallableForward(g, arguments, settings.event_dims, name=name_of(g))
    conditions, block_function = inverse_conditions(f, jacobian)
    solution = solve_implicitly(
        conditions, arguments, forward, arguments.tensors, settings,
        jacobian=block_function, measurable=f is not None,
    )  # fmt: skip
    return result(solution, dtype, settings)


def inverse_conditions(
    f: Callable[[Tensor], Tensor] | None, jacobian: Tensor | Callable[[Tensor], Tensor] | None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
    """F(y, x) = f(y) − x and its Jacobian, from what the user knows of f."""
    if f is not None:
        return InverseConditions(f), None
    block_function = ConstantJacobian(jacobian.detach()) if isinstance(jacobian, Tensor) else jacobian
    assert block_function is not None
    return DeclaredJacobianConditions(block_function), lambda y, _x: block_function(y)


def implicit_function(
    conditions: Callable[..., Tensor],
    *,
    jacobian: Callable[..., Tensor] | None = None,
    **keywords: Unpack[CommonKeywords],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make your own solver function differentiable: the general form of every problem kind.

    Parameters
    ----------
    conditions : callable
        ``F(y, *args)`` in torch, zero where ``y = solve(*args)``.
    jacobian : callable, optional
        Your own ``∂F/∂y (y, *args) -> (*batch, n, n)``.
    **keywords
        As in :func:`root`.

    Returns
    -------
    decorator
        For ``solve(*args) -> y`` or ``-> (y, aux)``, called once on the whole batch and never
        differentiated; aux carries no gradient. With ``return_info=True`` the decorated function
        returns ``(result, SolveInfo)``. Its ``register_fake(function)`` tells ``torch.compile`` and
        ``torch.export`` what y looks like: ``function(*args)`` gives a tensor of its shape, dtype and device.

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
    settings = read_settings(keywords)

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


def batch_jacobian(
    f: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    method: Literal["fast", "full"] = "fast",
    create_graph: bool = False,
) -> Tensor:
    """∂f_b/∂y_b for every sample b of a batch, in one reverse pass per output.

    Parameters
    ----------
    f : callable
        ``(B, *event) -> (B, *out)``, whole-tensor, every sample treated alone.
    y : Tensor of shape ``(B, *event)``
    method : {"fast", "full"}
        ``"fast"`` pulls one unit vector back for all samples at once. ``"full"`` takes the whole
        ``(B, m, B, n)`` Jacobian, at B times the cost, and needs no independence to be right on the
        diagonal. Both agree for independent samples; for others ``"fast"`` raises.
    create_graph : bool
        Whether the result is itself differentiable.

    Returns
    -------
    Tensor of shape ``(B, m, n)``

    Raises
    ------
    ConditionsError
        If f mixes samples (``"fast"``), or returns something else than one row per sample.

    Examples
    --------
    >>> import torch
    >>> batch_jacobian(lambda y: y**2, torch.tensor([[1.0, 2.0]]))
    tensor([[[2., 0.],
             [0., 4.]]])
    """
    check_unknown("batch_jacobian", "y", y)
    if y.ndim == 0:
        raise ConditionsError("batch_jacobian: y has shape (); accepted is (B, *event), the batch first.")
    shape = SystemShape.of(y, y.ndim - 1)
    linearization = linearize(System(f, Arguments.flatten(()), shape), y, (), create_graph=create_graph)
    linearization.system.check_residual(linearization.value)
    if method == "full":
        return full_jacobian_blocks(linearization.rows, linearization.value.shape, shape.batch, shape.size, y)
    if method != "fast":
        raise ConditionsError(f"batch_jacobian(method={method!r}): accepted are 'fast' and 'full'.")
    return per_sample_blocks(linearization, check=True)
