"""``torch.broyden``: Broyden's good method for a whole batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from invlayer_core.linear.lu import LUFactors, lu_factor, lu_solve
from invlayer_core.native import iterative
from invlayer_core.native.iterative import IterativeSolver, pick, shortened
from invlayer_core.solvers.contract import BatchProblem
from invlayer_core.solvers.iterations import any_sample

__all__ = ["Broyden"]

_PATIENCE = 50  # evaluations without progress
_PROGRESS = 0.99
_DENSE = 512  # unknowns up to which "auto" forms a Jacobian


@final
@dataclass(frozen=True)
class _Options(iterative.Options):
    """``options=`` of ``torch.broyden``.

    maxiter : most evaluations of F. memory : updates until the Jacobian is taken anew, or forgotten; it is
    also where a line search fails.
    jacobian : what they start from: ``"exact"``, one evaluation of J; ``"identity"``, −I for a fixed point
    and a multiple of I for a root; ``"auto"``, exact for roots of up to 512 unknowns. ftol : a sample has
    converged once ‖F‖∞ ≤ ftol · (1 + ‖y‖∞); the default is eps^0.75. backtracks : how often a step may be
    shortened.
    """

    maxiter: int = 500
    memory: int = 20
    jacobian: Literal["auto", "exact", "identity"] = "auto"
    ftol: float | None = None
    backtracks: int = 5


@final
@dataclass(frozen=True)
class _State(iterative.State):
    """The last point with its residual, the next to try, and the inverse Jacobian B₀⁻¹ + Σ uᵢ vᵢᵀ."""

    residual: Tensor
    step: Tensor
    scale: Tensor
    size: Tensor
    shortened: Tensor
    left: Tensor  # (B, m, n), u
    right: Tensor  # (B, m, n), v
    base: Tensor  # (B, n, n), B₀; or (B, 1, 1): a multiple of I
    factors: Tensor
    pivots: Tensor
    best: Tensor
    waiting: Tensor
    iteration: int


@final
class Broyden(IterativeSolver):
    """Broyden's rank-one updates of the inverse Jacobian, with backtracking on ‖F‖.

    References
    ----------
    Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19 (1965). Kelley,
    Iterative Methods for Linear and Nonlinear Equations (1995), chapter 7.
    """

    name: ClassVar[str] = "torch.broyden"
    Options: ClassVar[type[iterative.Options]] = _Options

    def start(self, problem: BatchProblem, y0: Tensor, options: _Options) -> _State:
        count, size = y0.shape
        none = torch.zeros(count, dtype=torch.bool, device=y0.device)
        far = torch.full((count,), torch.inf, dtype=y0.dtype, device=y0.device)
        history = y0.new_zeros(count, max(1, options.memory), size)
        base = -torch.ones(count, 1, 1, dtype=y0.dtype, device=y0.device)
        return _State(
            y=y0, converged=none, failed=none, trial=y0, residual=torch.zeros_like(y0),
            step=torch.zeros_like(y0), scale=torch.ones_like(far), size=far, shortened=none.long(),
            left=history, right=history, base=base, factors=base, pivots=none.int().unsqueeze(-1),
            best=far, waiting=none.long(), iteration=0,
        )  # fmt: skip

    def step(self, problem: BatchProblem, state: _State, options: _Options) -> _State:
        slot = state.iteration % max(1, options.memory)
        stuck = state.shortened > options.backtracks
        state, residual = self._evaluated(problem, state, options, slot, stuck)
        size = residual.detach().norm(dim=-1)
        first, finite = state.size == torch.inf, size.isfinite()
        fallen = size <= state.size * (1 + 4 * torch.finfo(size.dtype).eps)
        accepted = finite & (fallen | (options.backtracks == 0))
        if slot and options.memory:
            state = _updated(state, residual, accepted & ~first & ~stuck, slot)
        y, residual = pick(accepted, state.trial, state.y), pick(accepted, residual, state.residual)
        step = pick(accepted | stuck, _apply(state, residual), state.step)
        scale = torch.where(accepted | stuck, 1.0, shortened(state.scale, state.size, size))
        flat = residual.detach().abs().amax(-1) <= _ftol(options, y) * (1 + y.detach().abs().amax(-1))
        converged = accepted & flat
        progress = size < _PROGRESS * state.best
        waiting = torch.where(progress, 0, state.waiting + 1)
        failed = ~converged & ((first & ~finite) | (waiting > _PATIENCE))
        count = torch.where(accepted, 0, state.shortened + 1)
        # Nowhere to go by these updates: the sample stays until it gets a Jacobian of its own.
        rests = failed | (count > options.backtracks)
        return dataclasses.replace(
            state, y=y, converged=converged, failed=failed,
            trial=pick(rests, y, y - scale.unsqueeze(-1) * step), residual=residual, step=step, scale=scale,
            size=torch.where(accepted, size, state.size), shortened=count,
            best=torch.where(progress, size, state.best), waiting=waiting, iteration=state.iteration + 1,
        )  # fmt: skip

    def _evaluated(
        self, problem: BatchProblem, state: _State, options: _Options, slot: int, stuck: Tensor
    ) -> tuple[_State, Tensor]:
        """F at the trial points; and what the updates start from, for all or for those that are stuck."""
        if not _is_exact(problem, options):
            residual = problem.residual(state.trial)
            renewed = _forgotten(state, problem, residual)
        elif slot == 0 or (stuck.device.type == "cpu" and any_sample(stuck)):
            residual, blocks = problem.linearized(state.trial)
            renewed = _from_jacobian(state, blocks)
        else:
            return state, problem.residual(state.trial)
        if slot == 0:
            return renewed, residual
        names = ("base", "factors", "pivots", "left", "right")
        kept: dict[str, Any] = {
            name: pick(stuck, getattr(renewed, name), getattr(state, name)) for name in names
        }
        return dataclasses.replace(state, **kept), residual

    def near(self, options: _Options) -> _Options:
        """Chords: updates by differences of rounding errors would be no use."""
        return dataclasses.replace(options, memory=0, backtracks=0)


def _is_exact(problem: BatchProblem, options: _Options) -> bool:
    if options.jacobian == "auto":
        return problem.kind != "fixed_point" and problem.size <= _DENSE
    return options.jacobian == "exact"


def _ftol(options: _Options, y: Tensor) -> float:
    return torch.finfo(y.dtype).eps ** 0.75 if options.ftol is None else options.ftol


def _from_jacobian(state: _State, blocks: Tensor) -> _State:
    """B₀ = J; I where J has no inverse."""
    identity = torch.diag_embed(torch.ones_like(state.y))
    singular = lu_factor(blocks.detach()).info != 0
    singular |= ~blocks.detach().isfinite().flatten(1).all(-1)
    blocks = pick(singular, identity, blocks)
    factors = lu_factor(blocks.detach())
    empty = torch.zeros_like(state.left)
    return dataclasses.replace(
        state, base=blocks, factors=factors.factors, pivots=factors.pivots, left=empty, right=empty
    )


def _forgotten(state: _State, problem: BatchProblem, residual: Tensor) -> _State:
    """B₀ as at the start: −I; for a root such a multiple of I that a step is a tenth of y."""
    empty = torch.zeros_like(state.left)
    if problem.kind == "fixed_point":
        return dataclasses.replace(state, left=empty, right=empty)
    size, length = residual.detach().norm(dim=-1), state.trial.detach().norm(dim=-1)
    base = torch.clamp(size / (0.1 * torch.clamp(length, min=1.0)), min=1.0).reshape(-1, 1, 1)
    return dataclasses.replace(state, base=base, factors=base, left=empty, right=empty)


def _solve_base(state: _State, rhs: Tensor, *, transpose: bool) -> Tensor:
    if state.base.shape[-1] == 1:  # also a system of one unknown
        return rhs / state.base.squeeze(-1)
    factors = LUFactors(state.factors, state.pivots, state.pivots)
    return lu_solve(state.base, rhs, factors, transpose=transpose)


def _apply(state: _State, rhs: Tensor, *, transpose: bool = False) -> Tensor:
    """The inverse Jacobian, or its transpose, times a vector of every sample."""
    left, right = (state.right, state.left) if transpose else (state.left, state.right)
    weights = right @ rhs.unsqueeze(-1)
    return _solve_base(state, rhs, transpose=transpose) + (left.mT @ weights).squeeze(-1)


def _updated(state: _State, residual: Tensor, usable: Tensor, slot: int) -> _State:
    """One more uvᵀ, so that the inverse Jacobian takes the last change of F to the last change of y."""
    move, change = state.trial - state.y, residual - state.residual
    usable = usable & change.detach().isfinite().all(-1)
    change = pick(usable, change, torch.zeros_like(change))
    predicted = _apply(state, change)
    denominator = (move * predicted).sum(-1)
    tiny = 1e-12 * move.detach().norm(dim=-1) * predicted.detach().norm(dim=-1)
    usable = usable & (denominator.detach().abs() > tiny)
    denominator = pick(usable, denominator, torch.ones_like(denominator)).unsqueeze(-1)
    zero = torch.zeros_like(move)
    left = pick(usable, (move - predicted) / denominator, zero)
    right = pick(usable, _apply(state, move, transpose=True), zero)
    here = (torch.arange(state.left.shape[1], device=move.device) == slot).reshape(1, -1, 1)
    return dataclasses.replace(
        state,
        left=torch.where(here, left.unsqueeze(1), state.left),
        right=torch.where(here, right.unsqueeze(1), state.right),
    )
