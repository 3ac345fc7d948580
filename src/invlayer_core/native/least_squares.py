"""What the least-squares solvers share: the model at the last point, trial points, and when to stop.

Every iteration is one evaluation of r and J for all samples, at their trial points. A sample whose cost has
fallen moves there, and takes a new step of the model ½‖r − J d‖²; another stays, and takes a shorter one from
the model that it has. What it keeps of the model is JᵀJ and Jᵀr: n × n numbers, however many residuals.

A sample has converged once the error that its step leaves is small. From the steps s₁, s₂ of a method that
gains a factor ρ = s₂/s₁ that error is about s₂ ρ / (1 − ρ), be the gain linear or better. It also has where
its model promises no more than rounding.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from invlayer_core.linear.lu import lu_factor, lu_solve
from invlayer_core.native import iterative
from invlayer_core.native.iterative import IterativeSolver, pick
from invlayer_core.solvers.contract import BatchProblem
from invlayer_core.solvers.iterations import may_have

__all__ = ["LeastSquares", "Options", "State", "solve_normal"]

_PATIENCE = 20  # evaluations without progress
_PROGRESS = 0.99


@dataclass(frozen=True)
class Options(iterative.Options):
    """What every least-squares solver takes.

    maxiter : most evaluations of r and J. xtol : a sample has converged once the error that its step leaves
    is shorter than ``xtol * max|y|``; the default is eps^0.75. safeguard : whether steps that raise the cost
    are taken back; without, each iteration is a full step.
    """

    xtol: float | None = None
    safeguard: bool = True


@dataclass(frozen=True)
class State(iterative.State):
    """The last point, its model and the step from it; ``control`` is what shortens steps."""

    trial: Tensor
    step: Tensor
    gram: Tensor  # JᵀJ
    slope: Tensor  # Jᵀr
    cost: Tensor  # ½‖r‖²
    length: Tensor  # of the step; 0 if it was taken back, and says nothing of a rate
    control: Tensor
    best: Tensor
    waiting: Tensor
    iteration: int


class LeastSquares(IterativeSolver):
    """A least-squares solver is a way to control its steps."""

    Options: ClassVar[type[iterative.Options]] = Options

    @abstractmethod
    def first_control(self, y: Tensor, gram: Tensor, options: Any) -> Tensor:
        """The control of the first step, ``(B,)``."""

    @abstractmethod
    def next_control(self, state: Any, gain: Tensor, accepted: Tensor, options: Any) -> Tensor:
        """The control after a step that had this gain, the actual over the promised change of the cost."""

    @abstractmethod
    def model_step(self, gram: Tensor, slope: Tensor, control: Tensor, options: Any) -> Tensor:
        """d, to be subtracted from y."""

    def start(self, problem: BatchProblem, y0: Tensor, options: Any) -> State:
        none = torch.zeros(y0.shape[0], dtype=torch.bool, device=y0.device)
        far = torch.full(none.shape, torch.inf, dtype=y0.dtype, device=y0.device)
        gram = y0.new_zeros(*y0.shape, y0.shape[1])
        return State(
            y=y0, converged=none, failed=none, trial=y0, step=torch.zeros_like(y0), gram=gram,
            slope=torch.zeros_like(y0), cost=far, length=torch.zeros_like(far),
            control=far, best=far, waiting=none.long(), iteration=0,
        )  # fmt: skip

    def step(self, problem: BatchProblem, state: Any, options: Any) -> Any:
        residuals, blocks = problem.linearized(state.trial, "residuals")
        transposed = blocks.mT
        gram, slope = transposed @ blocks, (transposed @ residuals.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            cost = 0.5 * residuals.square().sum(-1)
            accepted = cost.isfinite()
            if state.iteration == 0:
                control = self.first_control(state.trial, gram, options)
            else:
                if options.safeguard:  # near the solution rounding decides whether the cost falls
                    accepted &= cost <= state.cost * (1 + 4 * torch.finfo(cost.dtype).eps)
                gain = (state.cost - cost) / _promised(state)
                control = self.next_control(state, gain, accepted, options)
        if may_have(~accepted):
            y, gram = pick(accepted, state.trial, state.y), pick(accepted, gram, state.gram)
            slope, cost = pick(accepted, slope, state.slope), torch.where(accepted, cost, state.cost)
        else:
            y = state.trial
        step = self.model_step(gram, slope, control, options)
        return self._judged(state, y, step, gram, slope, cost, control, accepted, options)

    def _judged(
        self, state: Any, y: Tensor, step: Tensor, gram: Tensor, slope: Tensor, cost: Tensor,
        control: Tensor, accepted: Tensor, options: Any,
    ) -> Any:  # fmt: skip
        """The next state: which samples have converged, which give up."""
        with torch.no_grad():
            eps = torch.finfo(y.dtype).eps
            length, size = step.abs().amax(-1), y.abs().amax(-1)
            rate = length / state.length
            left = length * rate / (1 - rate).clamp(min=0.1)
            xtol = eps**0.75 if options.xtol is None else options.xtol
            promised = 0.5 * (slope * step).sum(-1)
            converged = (left <= xtol * size) | (promised <= eps * cost) | (length <= 4 * eps * size)
            converged &= accepted & step.isfinite().all(-1)
            progress = cost < _PROGRESS * state.best
            waiting = torch.where(progress, 0, state.waiting + 1)
            failed = ~converged & (waiting > _PATIENCE) if state.iteration else ~accepted
            best = torch.where(progress, cost, state.best)
        trial = y - step
        if may_have(failed):
            trial = pick(failed, y, trial)
        return dataclasses.replace(
            state, y=pick(converged, trial, y) if may_have(converged) else y, converged=converged,
            failed=failed, trial=trial, step=step, gram=gram, slope=slope, cost=cost,
            length=torch.where(accepted, length, 0.0), control=control, best=best, waiting=waiting,
            iteration=state.iteration + 1,
        )  # fmt: skip

    def finish(self, state: Any) -> Tensor:
        return pick(state.trial.isfinite().all(-1), state.trial, state.y)

    def near(self, options: Any) -> Any:
        return dataclasses.replace(options, safeguard=False)


def _promised(state: State) -> Tensor:
    """By how much the model's cost falls on the step: ⟨Jᵀr, d⟩ − ½ dᵀJᵀJ d."""
    curved = (state.gram @ state.step.unsqueeze(-1)).squeeze(-1)
    return (state.step * (state.slope - 0.5 * curved)).sum(-1)


def solve_normal(gram: Tensor, slope: Tensor, damping: Tensor | None = None) -> Tensor:
    """d with (JᵀJ + λ D) d = Jᵀr, where D = diag(JᵀJ); a short step down the slope where that fails.

    The unknowns are measured in the lengths of J's columns, so that their units do not matter.
    """
    lengths = gram.detach().diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    scaled = gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
    if damping is not None:
        identity = torch.diag_embed(torch.ones_like(slope))
        scaled = scaled + damping.reshape(-1, 1, 1) * identity
    rhs = slope / lengths
    step = lu_solve(scaled, rhs, lu_factor(scaled.detach()))
    regular = step.detach().isfinite().all(-1)
    if may_have(~regular):
        identity = torch.diag_embed(torch.ones_like(slope))
        safe = pick(regular, scaled, torch.nan_to_num(scaled) + identity)
        step = lu_solve(safe, rhs, lu_factor(safe.detach()))
    return step / lengths
