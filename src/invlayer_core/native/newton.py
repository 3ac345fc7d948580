"""``torch.newton``: Newton's method for a whole batch, with a line search per sample."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from invlayer_core.linear.lu import LUFactors, lu_factor, lu_solve
from invlayer_core.native import iterative
from invlayer_core.native.iterative import IterativeSolver, pick, shortened
from invlayer_core.solvers.contract import BatchProblem
from invlayer_core.solvers.iterations import may_have

__all__ = ["Newton"]

_PATIENCE = 10  # further evaluations without progress, after as many as a line search may take
_PROGRESS = 0.99


@final
@dataclass(frozen=True)
class _Options(iterative.Options):
    """``options=`` of ``torch.newton``.

    maxiter : most evaluations of F and J, each of which gives one step or shortens one. xtol : a sample has
    converged once its step is shorter than ``xtol * max|y|``; as the error is then about the square of it,
    the default is eps^0.55. backtracks : how often a step may be shortened.
    """

    xtol: float | None = None
    backtracks: int = 10


@final
@dataclass(frozen=True)
class _State(iterative.State):
    """The last point that was accepted, ``y``, and the next to try: ``y − scale · step``."""

    step: Tensor
    scale: Tensor
    size: Tensor  # ‖F(y)‖
    shortened: Tensor
    best: Tensor  # the smallest ‖F‖ so far
    waiting: Tensor  # evaluations since it fell


@final
class Newton(IterativeSolver):
    """Batched Newton–Raphson with backtracking on ‖F‖, and a Levenberg–Marquardt step where J fails.

    Every iteration is one evaluation of F and J for all samples: a sample whose trial point is no better than
    the last one shortens its step, the others take a new one. A sample that makes no progress gives up.

    References
    ----------
    Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations (1983),
    algorithms 6.1.3 and 6.5.1.
    """

    name: ClassVar[str] = "torch.newton"
    Options: ClassVar[type[iterative.Options]] = _Options

    def start(self, problem: BatchProblem, y0: Tensor, options: _Options) -> _State:
        none = torch.zeros(y0.shape[0], dtype=torch.bool, device=y0.device)
        count, far = none.long(), torch.full_like(y0[:, 0], torch.inf)
        step, scale = torch.zeros_like(y0), torch.ones_like(far)
        return _State(y0, none, none, y0, step, scale, far, count, far, count)

    def step(self, problem: BatchProblem, state: _State, options: _Options) -> _State:
        residual, blocks = problem.linearized(state.trial)
        size = residual.detach().norm(dim=-1)
        finite = size.isfinite()
        # Near the solution rounding decides whether ‖F‖ falls: a step that does not raise it is good.
        fallen = size <= state.size * (1 + 4 * torch.finfo(size.dtype).eps)
        accepted = finite & (fallen | (state.shortened >= options.backtracks))
        new, regular = _newton_step(blocks, residual)
        step = pick(accepted, new, state.step)
        y = pick(accepted, state.trial, state.y)
        scale = torch.where(accepted, 1.0, shortened(state.scale, state.size, size))
        small = step.detach().abs().amax(-1) <= self._xtol(options, y) * y.detach().abs().amax(-1)
        converged = accepted & ((small & regular) | (size == 0))
        progress = size < _PROGRESS * state.best
        waiting = torch.where(progress, 0, state.waiting + 1)
        # Nowhere to go: F is not finite where the sample starts, or wherever its step leads.
        lost = ~finite & ((state.size == torch.inf) | (state.shortened >= options.backtracks))
        failed = ~converged & (lost | (waiting > options.backtracks + _PATIENCE))
        trial = pick(failed, y, y - scale.unsqueeze(-1) * step)
        return _State(
            y=y,
            converged=converged,
            failed=failed,
            trial=trial,
            step=step,
            scale=scale,
            size=torch.where(accepted, size, state.size),
            shortened=torch.where(accepted, 0, state.shortened + 1),
            best=torch.where(progress, size, state.best),
            waiting=waiting,
        )

    def near(self, options: _Options) -> _Options:
        return dataclasses.replace(options, backtracks=0)

    def _xtol(self, options: _Options, y: Tensor) -> float:
        return torch.finfo(y.dtype).eps ** 0.55 if options.xtol is None else options.xtol


def _newton_step(blocks: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """J⁻¹F where that is finite, else a damped least-squares step; and where it was regular."""
    factors = lu_factor(blocks.detach())
    step = lu_solve(blocks, residual, factors)
    regular = step.detach().isfinite().all(-1)
    if may_have(~regular):
        identity = torch.diag_embed(torch.ones_like(residual))
        in_place = torch.arange(1, blocks.shape[-1] + 1, dtype=factors.pivots.dtype, device=blocks.device)
        keep = regular.unsqueeze(-1)
        # Solved again without the others: the derivative of where(mask, finite, infinite) is NaN.
        safe = LUFactors(
            torch.where(keep.unsqueeze(-1), factors.factors, identity),
            torch.where(keep, factors.pivots, in_place),
            factors.info,
        )
        step = lu_solve(torch.where(keep.unsqueeze(-1), blocks, identity), residual, safe)
        damped = _damped_step(torch.where(keep.unsqueeze(-1), identity, blocks), residual)
        step = torch.where(keep, step, damped)
    return step, regular


def _damped_step(blocks: Tensor, residual: Tensor) -> Tensor:
    """(JᵀJ + μI)⁻¹Jᵀ F with μ = ‖F‖‖J‖: between Gauss–Newton and steepest descent."""
    blocks, residual = torch.nan_to_num(blocks), torch.nan_to_num(residual)
    damping = residual.detach().norm(dim=-1) * torch.linalg.matrix_norm(blocks.detach())
    damping = damping + torch.finfo(blocks.dtype).tiny ** 0.5
    identity = torch.diag_embed(torch.ones_like(residual))
    gram = blocks.mT @ blocks + damping[:, None, None] * identity
    return lu_solve(gram, (blocks.mT @ residual.unsqueeze(-1)).squeeze(-1), lu_factor(gram.detach()))
