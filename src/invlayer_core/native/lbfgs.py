"""``torch.lbfgs``: L-BFGS for a whole batch, with a line search per sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.native import iterative
from invlayer_core.native.iterative import IterativeSolver, pick
from invlayer_core.solvers.contract import BatchProblem

__all__ = ["LBFGS"]

_DECREASE = 1e-4  # of the slope: Wolfe's first condition
_CURVATURE = 0.9  # of the slope: Wolfe's second
_PATIENCE = 30  # evaluations without a new point


@final
@dataclass(frozen=True)
class _Options(iterative.Options):
    """``options=`` of ``torch.lbfgs``.

    maxiter : most evaluations of the objective with its gradient. memory : how many differences are kept.
    gtol : a sample has converged once ‖∇f‖∞ ≤ gtol · (1 + |f|), or once rounding hides any further descent;
    the default is eps^0.7.
    """

    maxiter: int = 1000
    memory: int = 10
    gtol: float | None = None


@final
@dataclass(frozen=True)
class _State(iterative.State):
    """The last point with value and slope; the direction; and where the line search stands."""

    value: Tensor  # f(y)
    slope: Tensor  # ∇f(y)
    direction: Tensor
    descent: Tensor  # ⟨∇f(y), direction⟩
    length: Tensor  # of the trial step
    low: Tensor  # too short
    high: Tensor  # too long; infinite as long as nothing was
    moves: Tensor  # (B, m, n): the differences of y, oldest first; zero where there is none
    changes: Tensor  # (B, m, n): those of ∇f
    waiting: Tensor
    iteration: int


@final
class LBFGS(IterativeSolver):
    """Limited-memory BFGS in its compact form, with a bisecting line search for the weak Wolfe conditions.

    Every iteration is one evaluation of f and ∇f for all samples, at their trial points: a sample in its line
    search tries another length, one that has ended it takes a new direction. An objective that grows without
    a pause along a direction is followed until rounding; the certificate tells.

    References
    ----------
    Byrd, Nocedal & Schnabel, Representations of quasi-Newton matrices, Math. Program. 63 (1994), equation
    2.27. Lewis & Overton, Nonsmooth optimization via quasi-Newton methods, Math. Program. 141 (2013),
    algorithm 2.6.
    """

    name: ClassVar[str] = "torch.lbfgs"
    Options: ClassVar[type[iterative.Options]] = _Options

    def start(self, problem: BatchProblem, y0: Tensor, options: _Options) -> _State:
        none = torch.zeros(y0.shape[0], dtype=torch.bool, device=y0.device)
        zero = torch.zeros(none.shape, dtype=y0.dtype, device=y0.device)
        history, nothing = (
            y0.new_zeros(y0.shape[0], max(1, options.memory), y0.shape[1]),
            torch.zeros_like(y0),
        )
        return _State(
            y=y0, converged=none, failed=none, trial=y0, value=zero, slope=nothing, direction=nothing,
            descent=zero, length=zero, low=zero, high=zero + torch.inf, moves=history, changes=history,
            waiting=none.long(), iteration=0,
        )  # fmt: skip

    def step(self, problem: BatchProblem, state: _State, options: _Options) -> _State:
        value, slope = problem.linearized(state.trial, "objective")
        value, slope = value.reshape(-1), slope.reshape(state.trial.shape)
        known = value.detach()
        finite = known.isfinite() & slope.detach().isfinite().all(-1)
        if state.iteration == 0:
            accepted, state = finite, dataclasses.replace(state, failed=~finite)
        else:
            accepted, state = _searched(state, known, slope.detach(), finite)
            state = _with_difference(state, slope, accepted)
        y = pick(accepted, state.trial, state.y)
        value = torch.where(accepted, known, state.value)
        slope = pick(accepted, slope, state.slope)
        direction = pick(accepted, _direction(state, slope), state.direction)
        length = state.length
        if state.iteration == 0:
            length = 1 / slope.detach().norm(dim=-1).clamp(min=1.0)
        return self._judged(state, y, value, slope, direction, length, accepted, options)

    def _judged(
        self, state: _State, y: Tensor, value: Tensor, slope: Tensor, direction: Tensor, length: Tensor,
        accepted: Tensor, options: _Options,
    ) -> _State:  # fmt: skip
        with torch.no_grad():
            eps = torch.finfo(y.dtype).eps
            gtol = eps**0.7 if options.gtol is None else options.gtol
            steepest = slope.abs().amax(-1)
            descent = (slope * direction).sum(-1)
            flat = steepest <= gtol * (1 + value.abs())
            # Rounding hides what a step gains: what is left to gain is about ½ |⟨∇f, d⟩|.
            hidden = accepted & (descent.abs() <= 0.1 * eps * value.abs())
            converged = (flat | hidden) & slope.isfinite().all(-1) & ~state.failed
            waiting = torch.where(accepted, 0, state.waiting + 1)
            failed = state.failed | (~converged & (waiting > _PATIENCE))
        trial = y + length.unsqueeze(-1) * direction
        return dataclasses.replace(
            state, y=y, converged=converged, failed=failed, trial=pick(failed | converged, y, trial),
            value=value, slope=slope, direction=direction, descent=descent, length=length, waiting=waiting,
            iteration=state.iteration + 1,
        )  # fmt: skip

    def iterate(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any], steps: int) -> Tensor:
        raise ConditionsError(
            f"{self.name}: its iterations from a solution say nothing of the derivative, as it knows "
            "curvature from the way there alone. Accepted with it are adjoint=Unrolled(), Implicit() and "
            "DLM(); for Truncated take a least-squares solver, such as torch.gauss_newton."
        )


def _searched(state: _State, value: Tensor, slope: Tensor, finite: Tensor) -> tuple[Tensor, _State]:
    """Whether the trial point ends the line search; and the length to try next where it does not."""
    eps = torch.finfo(value.dtype).eps
    rounding = 4 * eps * torch.maximum(state.value.abs(), value.abs())
    along = (slope * state.direction).sum(-1)
    decreased = value <= state.value + _DECREASE * state.length * state.descent
    # Where rounding hides the descent, the slope still shows it (Hager & Zhang 2005).
    level = (value <= state.value + rounding) & ((2 * _DECREASE - 1) * state.descent >= along)
    low_enough = finite & (decreased | level)
    accepted = low_enough & (along >= _CURVATURE * state.descent)
    high = torch.where(low_enough, state.high, state.length)
    low = torch.where(low_enough, state.length, state.low)
    longer = torch.where(high < torch.inf, 0.5 * (low + high), 2 * state.length)
    bent = _parabola(state, value)
    shorter = torch.where(
        bent.isfinite(), bent.clamp(low + 0.1 * (high - low), low + 0.5 * (high - low)), longer
    )
    first = (state.low == 0) & ~low_enough  # the parabola knows f at 0 alone
    length = torch.where(first & finite, shorter, longer)
    # Too near each other to go on: the last point that was low enough has to do.
    accepted |= low_enough & (high < torch.inf) & (high - low <= 1e-10 * high)
    return accepted, dataclasses.replace(
        state,
        length=torch.where(accepted, 1.0, length),
        low=torch.where(accepted, 0.0, low),
        high=torch.where(accepted, torch.inf, high),
    )


def _parabola(state: _State, value: Tensor) -> Tensor:
    """Where the parabola through f and its slope at 0 and f at the trial length is least."""
    excess = value - state.value - state.length * state.descent
    return -0.5 * state.descent * state.length.square() / excess


def _with_difference(state: _State, slope: Tensor, accepted: Tensor) -> _State:
    """The history with the last difference at its end, if that shows a positive curvature."""
    move, change = state.trial - state.y, slope - state.slope
    with torch.no_grad():
        curved = (move * change).sum(-1)
        usable = accepted & (curved > 1e-12 * move.norm(dim=-1) * change.norm(dim=-1))
    shifted = torch.cat([state.moves[:, 1:], move.unsqueeze(1)], 1)
    changed = torch.cat([state.changes[:, 1:], change.unsqueeze(1)], 1)
    return dataclasses.replace(
        state, moves=pick(usable, shifted, state.moves), changes=pick(usable, changed, state.changes)
    )


def _direction(state: _State, slope: Tensor) -> Tensor:
    """−H ∇f with H = γI + [S γY] [[R⁻ᵀ(D + γYᵀY)R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [S γY]ᵀ, R the upper triangle of SᵀY.

    Rows that are empty get 1 on the diagonal of R, and zeros everywhere else, so that they add nothing.
    """
    moves, changes = state.moves, state.changes
    products = moves @ changes.mT
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    empty = (moves.detach() == 0).all(-1)
    newest, own = diagonal[:, -1], changes[:, -1].square().sum(-1)
    scale = torch.where(empty[:, -1], 1.0, newest / torch.where(empty[:, -1], 1.0, own)).unsqueeze(-1)
    upper = torch.triu(products) + torch.diag_embed(empty.to(slope.dtype))
    along, across = moves @ slope.unsqueeze(-1), changes @ slope.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(upper, along, upper=True)
    inner = diagonal.unsqueeze(-1) * solved + scale.unsqueeze(-1) * (
        (changes @ (changes.mT @ solved)) - across
    )
    weights = torch.linalg.solve_triangular(upper.mT, inner, upper=False)
    step = scale * slope + (moves.mT @ weights - scale.unsqueeze(-1) * (changes.mT @ solved)).squeeze(-1)
    return -step
