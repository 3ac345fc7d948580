"""The spine: from args to a differentiable solution, read top to bottom.

    solve     any library finds y*; no gradient is recorded           execution/
    certify   F(y*, args) is measured, once, per sample               captured.py, certificate.py
    polish    optionally, Newton steps on F                           polish.py
    attach    y* becomes a differentiable function of the args        adjoints/

A problem kind (root, fixed point, inverse, ...) is no more than conditions F and a forward solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core._autocast import autocast_is_on, without_autocast
from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.unchanged import Certified
from invlayer_core.captured import evaluate_and_capture
from invlayer_core.certificate import (
    SolveInfo,
    Verdict,
    absolute_tolerance,
    all_hold,
    judge,
    nudged,
    report_failures,
)
from invlayer_core.conditions.structured import StructuredConditions, StructuredJacobian
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import Forward, run_forward
from invlayer_core.execution.limits import Limits
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.plan import BatchMode, check_batch
from invlayer_core.inputs import outside_inference_mode
from invlayer_core.leaves import EventDims, check_event_dims
from invlayer_core.linear.factor_bank import FactorBank
from invlayer_core.polish import polish
from invlayer_core.solvers.contract import Status
from invlayer_core.solvers.direct import Factor, handed_factors
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["BatchMode", "OnFailure", "Settings", "Solution", "find_captured", "solve_implicitly"]

OnFailure = Literal["raise", "warn", "nan", "zero_grad"]


@final
@dataclass(frozen=True)
class Settings:
    """The keywords that every problem kind shares.

    Parameters
    ----------
    on_failure : {"raise", "warn", "nan", "zero_grad"}
        What a sample becomes whose residual misses the tolerance: an error for the whole call; a warning,
        with value and gradient as they are; NaN in both; or the value as it is with a zero gradient.
    atol, rtol : float, optional
        A sample is accepted if ‖F(y*)‖∞ ≤ atol, or if the excess is no more than what a change of y* by a
        fraction rtol does to F. Both default to 1e-6 in float64 and 1e-3 in float32.
    polish : int or "auto"
        Newton steps on F after the solve, each kept only where it lowers the residual. ``"auto"`` goes on
        as long as one sample gains, up to 20.
    event_dims : int, or a pytree of int
        The last ``event_dims`` dims of y are one system's unknowns; leading dims are batch. For a pytree of
        unknowns: one number for all leaves, or one for each in the structure of y.
    adjoint : Adjoint
        The rule by which derivatives cross the solve.
    batch : {"auto", "serial", "threads", "processes", "lockstep", "stacked"}
        How a per-sample solver runs over a batch: one sample after the other; several at a time, in threads
        or in processes; all at once in threads that take turns, with one batched evaluation of F per round;
        or all as one system. Results are the same. ``"auto"`` chooses by what the solver declares and what
        F costs; ``info.batch_reason`` tells why.
    executor : concurrent.futures.Executor, optional
        Where chunks of the batch are solved instead: your own pool, or a cluster.
    timeout : float, optional
        Seconds that a per-sample solver may take for one sample before it is stopped.
    progress : bool
        Show a bar that counts samples; needs tqdm.
    return_info : bool
        Return ``(y, SolveInfo)``.
    n_starts : int
        How many guesses y0 holds for each sample, ``(n_starts, *batch, *event)``. They are tried in order,
        until one leads to a solution; of minima the lowest is taken. ``info.start`` tells which it was.
    warm_start : pair ``(y, info)``, or None
        What the call before returned with ``return_info=True``: samples that converged start there, the
        others from y0 (its first guess, if there are several).
    compile : bool
        Take first derivatives in reverse mode by one function that ``torch.compile`` has made of the
        conditions, their Jacobian and the linear solve. Worth it where the conditions live on: on a layer, or
        as a function at module level. It compiles again for each new function.
    """

    on_failure: OnFailure = "raise"
    atol: float | None = None
    rtol: float | None = None
    polish: int | Literal["auto"] = 0
    event_dims: EventDims = 1
    adjoint: Adjoint = field(default_factory=Implicit)
    batch: BatchMode = "auto"
    executor: Executor | None = None
    timeout: float | None = None
    progress: bool = False
    return_info: bool = False
    compile: bool = False
    n_starts: int = 1
    warm_start: tuple[Any, SolveInfo] | None = None

    @property
    def limits(self) -> Limits:
        """How long, where and how visibly a per-sample solver runs."""
        return Limits(self.timeout, self.executor, self.progress)

    def __post_init__(self) -> None:
        accepted = get_args(OnFailure)
        if self.on_failure not in accepted:
            raise ConditionsError(
                f"on_failure={self.on_failure!r}: accepted are {', '.join(map(repr, accepted))}."
            )
        if self.polish != "auto" and (not isinstance(self.polish, int) or self.polish < 0):
            raise ConditionsError(f"polish={self.polish!r}: accepted is a number of steps >= 0, or 'auto'.")
        if not isinstance(self.adjoint, Adjoint):
            raise ConditionsError(
                f"adjoint={self.adjoint!r}: accepted is an instance from inv.adjoints, such as Implicit()."
            )
        if not isinstance(self.n_starts, int) or isinstance(self.n_starts, bool) or self.n_starts < 1:
            raise ConditionsError(f"n_starts={self.n_starts!r}: accepted is an integer >= 1.")
        check_batch(self.batch, self.limits)
        if not isinstance(self.event_dims, int) or self.event_dims < 0:
            check_event_dims(self.event_dims)


@final
@dataclass(frozen=True)
class Solution:
    """y*, differentiable, with what is known about it (``info`` only if asked for, or if a sample failed).

    ``dead`` are the samples ``(*batch,)`` without a derivative, if there are any.
    """

    y: Tensor
    info: SolveInfo | None
    outcome: Outcome
    dead: Tensor | None = None


def solve_implicitly(
    conditions: Callable[..., Tensor],
    arguments: Arguments,
    forward: Forward,
    tensors: Sequence[Tensor],
    settings: Settings,
    *,
    captured: tuple[Tensor, ...] | None = None,
    jacobian: Callable[..., Tensor] | None = None,
    measurable: bool = True,
    warm: Tensor | None = None,
) -> Solution:
    """Solve, certify, polish, attach.

    Parameters
    ----------
    conditions : callable
        ``F(y, *args)``, zero at the solution.
    arguments : Arguments
        args, taken apart.
    forward : Forward
        Finds y* from ``tensors``.
    tensors : sequence of Tensor
        What the forward is given: θ, or (y0, θ).
    settings : Settings
    captured : tuple of Tensor, optional
        The tensors that F captures, if they had to be found before the solve.
    jacobian : callable, optional
        The user's own ∂F/∂y.
    measurable : bool
        False if F is known only by its Jacobian, so that its value says nothing.
    warm : Tensor of bool, ``(*batch,)``, optional
        Which samples start from an earlier solution.
    """
    if autocast_is_on():
        with without_autocast():
            return solve_implicitly(
                conditions, arguments, forward, tensors, settings,
                captured=captured, jacobian=jacobian, measurable=measurable, warm=warm,
            )  # fmt: skip
    adjoint, watched = settings.adjoint, torch.is_grad_enabled() or _functorch.in_forward_mode()
    iterations = forward.iterations(tensors, repr(adjoint)) if adjoint.needs_iterations else None
    resolve = forward.resolver(tensors, repr(adjoint)) if adjoint.needs_resolve else None
    with outside_inference_mode():
        record = iterations if adjoint.records_solve and watched else None
        y, claimed, outcome = run_forward(forward, tensors, record)
    if outcome.structure is not None:  # y is a pytree, or complex: from here on one real vector per sample
        conditions = StructuredConditions(conditions, outcome.structure)
        jacobian = None if jacobian is None else StructuredJacobian(jacobian, outcome.structure)
        settings = replace(settings, event_dims=1)
    shape = SystemShape.of(y, settings.event_dims)
    parts = getattr(conditions, "parts", {})  # what an adjoint may need besides F, such as the objective
    system = System(
        conditions, arguments, shape, (), jacobian, measurable, settings.compile,
        parts=parts, chunk_size=adjoint.chunk_size,
    )  # fmt: skip
    system = system.with_captured(captured or ())
    if watched or _functorch.is_active():
        system = system.with_places()
    with _functorch.own_saved_tensors():
        system, residual = _certify(system, y, find=captured is None and watched)
    steps: Tensor | None = None
    factors: Sequence[Factor | None] = ()
    if settings.polish:
        with outside_inference_mode(), _functorch.own_saved_tensors():
            method = getattr(settings.adjoint, "linear_solver", None)
            y, residual, steps, factors = polish(system, y, residual, settings.polish, method)
    measured = system.shape.vectors(residual) if measurable else None
    certified: Certified | None = None
    if measured is not None:
        certified = Certified(measured, absolute_tolerance(y.dtype, settings.atol))
        holds = all_hold(y, measured, settings.atol)
    else:  # nothing to measure: it holds where the solver itself has no doubts
        holds = outcome.without_doubts and all_hold(y, y.new_zeros(()), settings.atol)
    if holds and not settings.return_info:
        solved = Solved(system, y, certified=certified, iterations=iterations, resolve=resolve)
        return Solution(_attach(solved, settings, outcome, factors), None, outcome)  # no one asked for more
    flat, beside = system.shape.vectors(y), None
    claimed = outcome.status.reshape(system.shape.batch) if claimed is None else claimed
    if measured is not None and not holds:
        beside = _residual_beside(system, nudged(flat, settings.rtol))
    verdict = judge(flat, measured, beside, claimed, settings.atol)
    info = _info(verdict, outcome, forward, steps, settings.adjoint.describe(system.shape, y.dtype))
    info = replace(info, start=_origin(info.ok, outcome, warm))
    report_failures(info, settings.on_failure, outcome.cause, arguments.tensors)
    y, dead = _bury(system, y, verdict, info, settings)
    solved = Solved(system, y, dead, certified=certified, iterations=iterations, resolve=resolve)
    return Solution(_attach(solved, settings, outcome, factors), info, outcome, dead)


def find_captured(system: System, y: Tensor) -> tuple[Tensor, ...]:
    """The tensors that F captures, from one evaluation at ``y``."""
    return _certify(system, y.detach(), find=True)[0].captured


def _certify(system: System, y: Tensor, *, find: bool) -> tuple[System, Tensor]:
    """F(y*, θ) once; the same evaluation tells whether F captures tensors."""
    known = [y, *[tensor.detach() for tensor in system.theta]]
    evaluate = lambda: system.residual(known[0], known[1:])  # noqa: E731
    if find:
        residual, captured = evaluate_and_capture(evaluate, known, system.function)
        system = system.with_captured(captured)
    else:
        with torch.no_grad():
            residual = evaluate()
    system.check_residual(residual)
    return system, residual.detach()


def _residual_beside(system: System, flat: Tensor) -> Tensor:
    """F at another point, without gradient: how large a residual a small error of y* makes."""
    with torch.no_grad():
        theta = [tensor.detach() for tensor in system.theta]
        return system.shape.vectors(system.residual(flat.reshape(system.shape.full), theta))


def _info(
    verdict: Verdict, outcome: Outcome, forward: Forward, steps: Tensor | None, linear_solver: str
) -> SolveInfo:
    status = _functorch.plain(verdict.status)
    return SolveInfo(
        ok=_functorch.plain(verdict.ok),
        status=tuple(Status(code) for code in status.reshape(-1).tolist()),
        residual=_functorch.plain(verdict.residual),
        tolerance=_functorch.plain(verdict.tolerance),
        iterations=outcome.iterations.reshape(status.shape),
        message=outcome.message,
        solver=forward.name,
        batch=outcome.how or forward.how,
        polish=torch.zeros_like(status) if steps is None else _functorch.plain(steps),
        aux=outcome.aux,
        linear_solver=linear_solver,
        batch_reason=outcome.why,
    )


def _origin(like: Tensor, outcome: Outcome, warm: Tensor | None) -> Tensor:
    """The number of the start that each solution comes from; -1 for an earlier solution."""
    first = torch.zeros_like(like, dtype=torch.int64)
    start = first if outcome.start is None else outcome.start.reshape(like.shape)
    return start if warm is None else torch.where(_functorch.plain(warm) & (start == 0), -1, start)


def _bury(
    system: System, y: Tensor, verdict: Verdict, info: SolveInfo, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Which samples have no derivative of their own, and the value they get."""
    if bool(info.ok.all()):
        return y, None
    dead = ~verdict.ok
    if settings.on_failure == "warn":  # as it is, unless it is nothing
        dead = dead & (verdict.status >= int(Status.NOT_FINITE))
    if settings.on_failure == "nan":
        mask = dead.reshape(*dead.shape, *(1 for _ in system.shape.event))
        y = torch.where(mask, torch.full_like(y, torch.nan), y)
    return y, dead


def _attach(solved: Solved, settings: Settings, outcome: Outcome, steps: Sequence[Factor | None]) -> Tensor:
    """y*, differentiable; ``steps`` are the factors that the polish left."""
    if not _needs_derivative(solved.system):
        return solved.y
    in_transform = _functorch.is_active()
    handed = () if in_transform else handed_factors(outcome.aux, solved.system.shape.count)
    iterations = solved.iterations
    return settings.adjoint.attach(
        replace(
            solved,
            dead_value=0.0 if settings.on_failure == "zero_grad" else torch.nan,
            certified=None if in_transform else solved.certified,
            factors=FactorBank(handed, own=steps),
            iterations=None if iterations is None else iterations.with_recorded(outcome.recorded),
        )
    )


def _needs_derivative(system: System) -> bool:
    if _functorch.is_active() or _functorch.in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in system.theta)
