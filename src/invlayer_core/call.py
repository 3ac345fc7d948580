"""From a user's call to the spine: keywords, initial guess, args and solver, checked and put in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.adjoint import Adjoint
from invlayer_core.certificate import SolveInfo
from invlayer_core.conditions.structured import StructuredConditions, StructuredJacobian, StructuredSolver
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError, UnsupportedTransformError
from invlayer_core.execution.forward import CallableForward, Forward
from invlayer_core.execution.plan import BatchMode, check_batched
from invlayer_core.execution.registered import RegisteredForward, open_options
from invlayer_core.execution.workload import Derivatives
from invlayer_core.implicit import OnFailure, Settings, Solution, find_captured, solve_implicitly
from invlayer_core.inputs import check_devices, is_real_tensor, working_precision
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.jacobians.per_sample import blocks_by_columns, per_sample_blocks
from invlayer_core.leaves import EventDims
from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.direct import is_factors
from invlayer_core.solvers.lookup import get_solver, solvers
from invlayer_core.solvers.problem import Products
from invlayer_core.solvers.registry import get_registry
from invlayer_core.starts import Starts, open_guess, previous_solution
from invlayer_core.structure import Arguments
from invlayer_core.structured import Structure

__all__ = [
    "DERIVATIVES",
    "CommonKeywords",
    "SolverLike",
    "choose_forward",
    "find_solver",
    "name_of",
    "open_arguments",
    "read_settings",
    "result",
    "result_with_aux",
    "solve_from_guess",
]

SolverLike = str | Solver | Callable[..., Any]


class CommonKeywords(TypedDict, total=False):
    """The keywords that every problem kind shares; see :class:`~invlayer_core.implicit.Settings`."""

    on_failure: OnFailure
    atol: float | None
    rtol: float | None
    polish: int | Literal["auto"]
    event_dims: EventDims
    adjoint: Adjoint
    batch: BatchMode
    executor: Executor | None
    timeout: float | None
    progress: bool
    return_info: bool
    compile: bool
    n_starts: int
    warm_start: tuple[Any, SolveInfo] | None


def solve_from_guess(
    kind: str,
    conditions: Callable[..., Any],
    y0: Any,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    jacobian: Callable[..., Tensor] | None,
    keywords: CommonKeywords,
) -> Any:
    """The kinds that start from a guess: find a forward, then run the spine."""
    args = args if isinstance(args, tuple) else (args,)
    y0 = open_guess(y0, args)
    if not is_real_tensor(y0):
        return _solve_structured(kind, conditions, y0, args, solver, options, jacobian, keywords)
    settings = read_settings(keywords)
    arguments, _ = open_arguments(args)
    check_devices(kind, y0, arguments.tensors)
    starts = Starts.of(kind, working_precision(y0).detach(), settings)
    parts = getattr(conditions, "parts", {})
    chunk_size = settings.adjoint.chunk_size
    system = System(conditions, arguments, starts.shape, (), jacobian, parts=parts, chunk_size=chunk_size)
    captured = find_captured(system, starts.first) if _functorch.is_active() else None
    system = system.with_captured(captured or ())
    forward, tensors = choose_forward(kind, system, starts.first, solver, options or {}, settings)
    if settings.n_starts > 1:
        forward, tensors = starts.in_turn(forward, tensors, system, settings)
    solution = solve_implicitly(
        conditions, arguments, forward, tensors, settings,
        captured=captured, jacobian=jacobian, warm=starts.warm,
    )  # fmt: skip
    return result(solution, y0.dtype, settings)


def _solve_structured(
    kind: str,
    conditions: Callable[..., Any],
    y0: Any,
    args: Any,
    solver: SolverLike,
    options: Mapping[str, Any] | None,
    jacobian: Callable[..., Tensor] | None,
    keywords: CommonKeywords,
) -> Any:
    """The same for a pytree of unknowns, or complex ones: as one real vector per sample, and back."""
    settings = read_settings(keywords)
    structure = Structure.of(kind, "y0", y0, settings.event_dims)
    registered = isinstance(solver, (str, Solver))
    inner: CommonKeywords = {**keywords, "event_dims": 1}
    if settings.warm_start is not None:
        previous, info = previous_solution(kind, settings.warm_start)
        inner["warm_start"] = (structure.pack(f"{kind}(warm_start=...)", previous), info)
    packed = solve_from_guess(
        kind,
        StructuredConditions(conditions, structure, square=registered),
        structure.pack(kind, y0),
        args,
        solver if isinstance(solver, (str, Solver)) else StructuredSolver(solver, structure),
        options,
        None if jacobian is None else StructuredJacobian(jacobian, structure),
        inner,
    )
    return (structure.restore(packed[0]), packed[1]) if settings.return_info else structure.restore(packed)


def choose_forward(
    kind: str,
    system: System,
    start: Tensor,
    solver: SolverLike,
    options: Mapping[str, Any],
    settings: Settings,
    *,
    bounds: int = 0,
) -> tuple[Forward, tuple[Tensor, ...]]:
    """The forward that ``solver`` stands for, and the tensors that it takes.

    The last ``bounds`` of the args are the engine's, and kept from a plain callable.
    """
    if isinstance(solver, (str, Solver)):
        instance, name, thread_safe = find_solver(solver, kind)
        if instance.batched:
            check_batched(name, settings.batch, settings.limits)
        opened = open_options(options)
        forward = RegisteredForward(
            name, kind, instance, settings.batch, thread_safe, settings.limits, opened, system, DERIVATIVES
        )
        return forward, (start, *system.theta, *opened.tensors)
    if options:
        raise ConditionsError(
            f"options={dict(options)!r} came with solver={solver!r}, a plain callable: accepted are options "
            "for registered solvers; bind a function's own with functools.partial."
        )
    args = system.arguments.unflatten(system.arguments.tensors)
    arguments = Arguments.flatten((start, *args[: len(args) - bounds]))
    plain = CallableForward(
        solver, arguments, settings.event_dims, expected=system.shape.full, name=name_of(solver)
    )
    return plain, arguments.tensors


def find_solver(solver: str | Solver, kind: str) -> tuple[Solver, str, bool]:
    """The instance, its name, and whether several threads may use it at once."""
    if isinstance(solver, Solver):
        return solver, solver.label, False
    spec = get_registry().get_spec(solver, called=f"{kind}(solver={solver!r})")
    if kind not in spec.kinds:
        able = ", ".join(listing.name for listing in solvers(kind))
        raise ConditionsError(
            f"{kind}(solver={solver!r}): that solver is for {', '.join(spec.kinds)}; accepted here: {able}."
        )
    return get_solver(solver), solver, spec.thread_safe


def _solver_jacobian(system: System, y: Tensor, theta: Any) -> Tensor:
    """J for a forward solver: no gradient is recorded, and mixing samples only costs it speed."""
    return _blocks(linearize(system, y.detach(), theta)).detach()


def _blocks(linearization: Linearization) -> Tensor:
    tall = linearization.value.numel() > linearization.y.numel() and linearization.system.jacobian is None
    return blocks_by_columns(linearization) if tall else per_sample_blocks(linearization)


def _solver_second_derivative(system: System, y: Tensor, theta: Any) -> Tensor:
    """d²F/dy² of scalar equations for a forward solver, whose samples do not touch each other."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(system.residual(y, theta).sum(), y, create_graph=True)
        if not slope.requires_grad:  # F is linear in y
            return torch.zeros_like(y)
        (second,) = torch.autograd.grad(slope.sum(), y, allow_unused=True, materialize_grads=True)
    return second.detach()


def _solver_linearized(system: System, y: Tensor, theta: Any, recorded: bool) -> tuple[Tensor, Tensor]:
    """F and J for a forward solver, from one evaluation; on the graph if they are to be recorded."""
    if not recorded:
        linearization = linearize(system, y.detach(), theta)
        return linearization.value.detach(), _blocks(linearization).detach()
    linearization = linearize(
        system, y, theta, create_graph=torch.is_grad_enabled() or _functorch.in_forward_mode()
    )
    return linearization.value, _blocks(linearization)


def _solver_products(system: System, y: Tensor, theta: Any) -> Products:
    """F with the products of J for a forward solver, from one evaluation."""
    linearization = linearize(system, y.detach(), theta)
    value = linearization.value
    if not value.requires_grad:  # F does not read y
        return Products(value, lambda _: torch.zeros_like(value), lambda _: torch.zeros_like(y))
    return Products(value.detach(), linearization.push_y, linearization.pull_y)


DERIVATIVES = Derivatives(_solver_jacobian, _solver_second_derivative, _solver_linearized, _solver_products)
"""How a forward solver's derivatives are taken."""


def open_arguments(args: tuple[Any, ...]) -> tuple[Arguments, torch.dtype | None]:
    """args in working precision, and the dtype that results should have."""
    arguments = Arguments.flatten(args)
    dtype = next((t.dtype for t in arguments.tensors if t.is_floating_point()), None)
    if all(working_precision(t) is t for t in arguments.tensors):
        return arguments, dtype
    raised = [working_precision(tensor) for tensor in arguments.tensors]
    return Arguments.flatten(arguments.unflatten(raised)), dtype


def read_settings(keywords: CommonKeywords, *, from_guess: bool = True) -> Settings:
    """The settings that the keywords of a call ask for; an unknown one is a ``TypeError``.

    Raises
    ------
    ConditionsError
        If a setting has no such value, or is about guesses where there are none (``from_guess=False``).
    """
    unknown = sorted(set(keywords) - set(CommonKeywords.__annotations__))
    if unknown:
        raise TypeError(
            f"unknown keyword{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; accepted besides the "
            f"named ones are {', '.join(sorted(CommonKeywords.__annotations__))}."
        )
    settings = Settings(**keywords)
    if not from_guess and (settings.n_starts > 1 or settings.warm_start is not None):
        raise ConditionsError(
            "n_starts= and warm_start= are for kinds that start from a guess y0, such as root; here a solver "
            "function of your own finds y. Leave them out, and let that function choose where it starts."
        )
    return settings


def result(solution: Solution, dtype: torch.dtype | None, settings: Settings) -> Any:
    """y in the caller's dtype, with its info if asked for."""
    y = _in_dtype(solution, dtype)
    return (y, solution.info) if settings.return_info else y


def _in_dtype(solution: Solution, dtype: torch.dtype | None) -> Any:
    """y in ``dtype``, or as the solver left it, in the structure in which the solver gave it."""
    structure = solution.outcome.structure
    if structure is not None:
        return structure.restore(solution.y, dtype)
    return solution.y if dtype is None else solution.y.to(dtype)


def result_with_aux(solution: Solution, dtype: torch.dtype | None, settings: Settings) -> Any:
    """y, or ``(y, aux)`` if the solver function returned such a pair; a factor alone is no aux."""
    y, aux = _in_dtype(solution, dtype), solution.outcome.aux
    if aux and is_factors(aux[0]):  # for the derivative, not for the user
        return (y, solution.info) if settings.return_info else y
    if len(aux) > 1:
        raise UnsupportedTransformError(
            "a solver function that returns (y, aux) was mapped by torch.vmap, which cannot hand out one aux "
            "for each slice. Accepted is a solver function that returns y alone, or one call on the whole "
            "batch."
        )
    pair = (y, aux[0]) if aux else y
    return (pair, solution.info) if settings.return_info else pair


def name_of(function: Any) -> str:
    """How messages call a user's function."""
    function = getattr(function, "function", function)  # from_numpy keeps the user's own
    return str(getattr(function, "__qualname__", type(function).__name__))
