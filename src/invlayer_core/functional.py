"""The problem kinds as functions: each builds its conditions and hands them to the spine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.implicit import Adjoint
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.inverse import ConstantJacobian, DeclaredJacobianConditions, InverseConditions
from invlayer_core.conditions.root import root_conditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import CallableForward, Forward, RegisteredForward
from invlayer_core.implicit import BatchMode, OnFailure, Settings, Solution, find_captured, solve_implicitly
from invlayer_core.inputs import check_devices, check_unknown, working_precision
from invlayer_core.jacobians.blocks import full_jacobian_blocks
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.lookup import get_solver, get_spec, solvers
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["CommonKeywords", "batch_jacobian", "fixed_point", "implicit_function", "inverse", "root"]

SolverLike = str | Solver | Callable[..., Tensor]


class CommonKeywords(TypedDict, total=False):
    """The keywords that every problem kind shares; see :class:`~invlayer_core.implicit.Settings`."""

    on_failure: OnFailure
    atol: float | None
    rtol: float | None
    polish: int | Literal["auto"]
    event_dims: int
    adjoint: Adjoint
    batch: BatchMode
    return_info: bool


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
        ``on_failure, atol, rtol, polish, event_dims, adjoint, batch, return_info``: see ``Settings``.

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
    return _solve_from("root", conditions, y0, args, solver, options, jacobian, keywords)


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
    return _solve_from("fixed_point", FixedPointConditions(T), y0, args, solver, options, None, keywords)


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
    check_unknown("inverse", "x", x)
    if (f is None) == (jacobian is None):
        came = "neither f= nor jacobian=" if f is None else "both f= and jacobian="
        raise ConditionsError(
            f"inverse(x, g, ...): got {came}; accepted is exactly one of them: the inverse f of g as a torch "
            "function, or its Jacobian at y = g(x)."
        )
    settings = _settings(keywords)
    arguments = Arguments.flatten((working_precision(x),))
    forward = CallableForward(g, arguments, settings.event_dims, name=_name(g))
    conditions, block_function = _inverse_conditions(f, jacobian)
    solution = solve_implicitly(
        conditions, arguments, forward, arguments.tensors, settings,
        jacobian=block_function, measurable=f is not None,
    )  # fmt: skip
    return _result(solution, x.dtype, settings)


def _inverse_conditions(
    f: Callable[[Tensor], Tensor] | None, jacobian: Tensor | Callable[[Tensor], Tensor] | None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
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
        returns ``(result, SolveInfo)``.

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
    settings = _settings(keywords)

    def decorate(solve: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solve)
        def differentiable(*args: Any) -> Any:
            arguments, dtype = _open_arguments(args)
            forward = CallableForward(solve, arguments, settings.event_dims, has_aux=True, name=_name(solve))
            solution = solve_implicitly(
                conditions, arguments, forward, arguments.tensors, settings, jacobian=jacobian
            )
            return _result_with_aux(solution, dtype or solution.y.dtype, settings)

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


def _solve_from(
    kind: str,
    conditions: Callable[..., Tensor],
    y0: Tensor,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    jacobian: Callable[..., Tensor] | None,
    keywords: CommonKeywords,
) -> Any:
    """The kinds that start from a guess: find a forward, then run the spine."""
    check_unknown(kind, "y0", y0)
    settings = _settings(keywords)
    arguments, _ = _open_arguments(args if isinstance(args, tuple) else (args,))
    check_devices(kind, y0, arguments.tensors)
    start = working_precision(y0).detach()
    system = System(conditions, arguments, SystemShape.of(start, settings.event_dims), (), jacobian)
    captured = find_captured(system, start) if _functorch.is_active() else None
    system = system.with_captured(captured or ())
    forward, tensors = _forward(kind, system, start, solver, options or {}, settings)
    solution = solve_implicitly(
        conditions, arguments, forward, tensors, settings, captured=captured, jacobian=jacobian
    )
    return _result(solution, y0.dtype, settings)


def _forward(
    kind: str,
    system: System,
    start: Tensor,
    solver: SolverLike,
    options: Mapping[str, Any],
    settings: Settings,
) -> tuple[Forward, tuple[Tensor, ...]]:
    if isinstance(solver, (str, Solver)):
        instance, name, thread_safe = _find_solver(solver, kind)
        how = _how_to_run(name, instance, thread_safe, settings.batch, system.shape.count)
        forward = RegisteredForward(name, instance, how, kind, dict(options), system, _solver_jacobian)
        return forward, (start, *system.theta)
    if options:
        raise ConditionsError(
            f"options={dict(options)!r} came with solver={solver!r}, a plain callable: accepted are options "
            "for registered solvers; bind a function's own with functools.partial."
        )
    arguments = Arguments.flatten((start, *system.arguments.unflatten(system.arguments.tensors)))
    return CallableForward(solver, arguments, settings.event_dims, name=_name(solver)), arguments.tensors


def _find_solver(solver: str | Solver, kind: str) -> tuple[Solver, str, bool]:
    if isinstance(solver, Solver):
        return solver, type(solver).__name__, False
    spec = get_spec(solver)
    if kind not in spec.kinds:
        able = ", ".join(listing.name for listing in solvers(kind))
        raise ConditionsError(
            f"{kind}(solver={solver!r}): that solver is for {', '.join(spec.kinds)}; accepted here: {able}."
        )
    return get_solver(solver), solver, spec.thread_safe


def _how_to_run(
    name: str, solver: Solver, thread_safe: bool, asked: BatchMode, count: int
) -> Literal["serial", "lockstep", "batched"]:
    if solver.batched:
        if asked != "auto":
            raise ConditionsError(
                f"{name} takes whole batches; batch={asked!r} is for per-sample solvers. Accepted is 'auto'."
            )
        return "batched"
    if asked == "auto":
        return "lockstep" if thread_safe and count > 1 else "serial"
    return asked


def _solver_jacobian(system: System, y: Tensor, theta: Any) -> Tensor:
    """J for a forward solver: no gradient is recorded, and mixing samples only costs it speed."""
    return per_sample_blocks(linearize(system, y.detach(), theta)).detach()


def _open_arguments(args: tuple[Any, ...]) -> tuple[Arguments, torch.dtype | None]:
    """args in working precision, and the dtype that results should have."""
    arguments = Arguments.flatten(args)
    dtype = next((t.dtype for t in arguments.tensors if t.is_floating_point()), None)
    if all(working_precision(t) is t for t in arguments.tensors):
        return arguments, dtype
    raised = [working_precision(tensor) for tensor in arguments.tensors]
    return Arguments.flatten(arguments.unflatten(raised)), dtype


def _settings(keywords: CommonKeywords) -> Settings:
    unknown = sorted(set(keywords) - set(CommonKeywords.__annotations__))
    if unknown:
        raise TypeError(
            f"unknown keyword{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; accepted besides the "
            f"named ones are {', '.join(sorted(CommonKeywords.__annotations__))}."
        )
    return Settings(**keywords)


def _result(solution: Solution, dtype: torch.dtype, settings: Settings) -> Any:
    y = solution.y.to(dtype)
    return (y, solution.info) if settings.return_info else y


def _result_with_aux(solution: Solution, dtype: torch.dtype, settings: Settings) -> Any:
    y = solution.y.to(dtype)
    result = (y, solution.outcome.aux[0]) if solution.outcome.aux else y
    return (result, solution.info) if settings.return_info else result


def _name(function: Any) -> str:
    function = getattr(function, "function", function)  # from_numpy keeps the user's own
    return str(getattr(function, "__qualname__", type(function).__name__))
