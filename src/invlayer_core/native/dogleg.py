"""``torch.dogleg``: Powell's dogleg for a whole batch, each sample with its own trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from invlayer_core.native import iterative, least_squares
from invlayer_core.native.least_squares import LeastSquares, State
from invlayer_core.native.normal_equations import Gram, column_lengths, promised, solve_normal, times

__all__ = ["Dogleg"]


@final
@dataclass(frozen=True)
class _Options(least_squares.Options):
    """``options=`` of ``torch.dogleg``.

    Those of all least-squares solvers, and radius : the trust region at the start, times ‖D y0‖ (or 1).
    """

    radius: float = 10.0


@final
class Dogleg(LeastSquares):
    """The Gauss–Newton step where it is trusted, else a way from the steepest descent towards it.

    Lengths are measured as ‖D d‖ with D² = diag JᵀJ.

    References
    ----------
    Powell, A hybrid method for nonlinear equations (1970). Nocedal & Wright, Numerical Optimization (2006),
    algorithm 4.1 and section 4.1.
    """

    name: ClassVar[str] = "torch.dogleg"
    Options: ClassVar[type[iterative.Options]] = _Options

    def first_control(self, y: Tensor, gram: Gram, options: _Options) -> Tensor:
        size = (y * column_lengths(gram)).norm(dim=-1)
        return options.radius * torch.where(size > 0, size, torch.ones_like(size))

    def next_control(
        self, state: State, cost: Tensor, accepted: Tensor, all_accepted: bool, options: _Options
    ) -> Tensor:
        if not options.safeguard:
            return torch.full_like(state.control, torch.inf)
        gain = (state.cost - cost) / promised(state.gram, state.slope, state.step)
        taken = (state.step * column_lengths(state.gram)).norm(dim=-1)
        wider = torch.where(gain > 0.75, torch.maximum(state.control, 3 * taken), state.control)
        return torch.where(accepted & (gain > 0.25), wider, 0.25 * torch.minimum(taken, state.control))

    def model_step(
        self, gram: Gram, slope: Tensor, control: Tensor, all_accepted: bool, options: _Options
    ) -> Tensor:
        newton = solve_normal(gram, slope)
        lengths = column_lengths(gram)
        radius = control.unsqueeze(-1)
        size = (newton * lengths).norm(dim=-1, keepdim=True).detach()
        if not options.safeguard:
            return newton
        cauchy = _steepest(gram, slope, lengths)
        short = (cauchy * lengths).norm(dim=-1, keepdim=True).detach()
        along = _share((cauchy * lengths).detach(), (newton * lengths).detach(), radius)
        bent = cauchy + along * (newton - cauchy)
        down = cauchy * (radius / short.clamp(min=torch.finfo(slope.dtype).tiny))
        return torch.where(size <= radius, newton, torch.where(short >= radius, down, bent))


def _steepest(gram: Gram, slope: Tensor, lengths: Tensor) -> Tensor:
    """The minimum of the model along the slope."""
    direction = slope / lengths.square()
    curvature = (direction * times(gram, direction)).sum(-1, keepdim=True)
    share = (slope * direction).sum(-1, keepdim=True) / curvature
    return direction * torch.where(curvature > 0, share, torch.zeros_like(share))


def _share(start: Tensor, end: Tensor, radius: Tensor) -> Tensor:
    """t in [0, 1] with ‖start + t (end − start)‖ = radius."""
    way = end - start
    a, b = way.square().sum(-1, keepdim=True), (start * way).sum(-1, keepdim=True)
    c = start.square().sum(-1, keepdim=True) - radius.square()
    root = (b.square() - a * c).clamp(min=0).sqrt()
    share = torch.where(b > 0, -c / (b + root), (root - b) / a)
    return torch.nan_to_num(share, nan=1.0).clamp(0, 1)
