"""Multipliers of a constrained minimum, from the point alone.

At a minimum ∇f = Aᵀλ, where the rows of A are the gradients of the constraints, λ vanishes where there is
slack, and is not negative but for equalities. So λ is estimated as the minimiser of

    ‖∇f − Aᵀλ‖² + Σ (wᵢ λᵢ)²,   wᵢ proportional to the slack,

(Glad & Polak 1979, equation 7), again without those inequalities whose multiplier came out negative. The
estimate is as accurate as the point; polishing makes both exact.

Where constraints depend on each other there are many λ, and that of least norm may vanish for an active
constraint. Among the others one is looked for that does not: only it tells which constraints are active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["estimate_multipliers"]

_SLACK = 1e-3  # a constraint with as much slack, relative to 1 + |y|, weighs as much as its gradient
_INACTIVE = 0.03  # a constraint with more slack has no multiplier
_ACTIVE = 1e-5  # slack, relative to 1 + |y|, up to which an inequality is taken for active
_WEAK = 1e-4  # a multiplier this small beside the largest one vanishes
_LEAST = (0.1, 0.01, 0.001)  # what active multipliers are asked to be at least, beside the largest one
_ROUNDS = 8


@torch.no_grad()
def estimate_multipliers(slope: Tensor, jacobian: Tensor, slack: Tensor, y: Tensor, equal: int) -> Tensor:
    """λ of shape ``(B, k)``.

    Parameters
    ----------
    slope : Tensor of shape ``(B, n)``
        ∇f.
    jacobian : Tensor of shape ``(B, k, n)``
        A.
    slack : Tensor of shape ``(B, k)``
        The constraints' values; ∞ for a bound that is not there.
    y : Tensor of shape ``(B, n)``
    equal : int
        How many of the constraints, the first ones, are equalities.
    """
    k = slack.shape[-1]
    if k == 0 or slack.shape[0] == 0:
        return slack.new_zeros(slack.shape)
    free = (torch.arange(k, device=slack.device) < equal).expand(slack.shape)
    size = 1 + y.abs().amax(-1, keepdim=True)
    weights = torch.where(free, 0.0, slack.abs() / (_SLACK * size)).nan_to_num(nan=0.0).clamp_max(1e4)
    rows = torch.nan_to_num(jacobian, posinf=0.0, neginf=0.0)
    usable = free | (slack <= _INACTIVE * size)  # elsewhere λ is zero, and not only small
    fit = _Fit(torch.nan_to_num(slope), rows, weights, free, usable)
    multipliers = fit.solve(torch.zeros_like(slack))
    active = ~free & (slack.abs() <= _ACTIVE * size)
    return _strictly(fit, multipliers, active)


def _strictly(fit: _Fit, multipliers: Tensor, active: Tensor) -> Tensor:
    """Multipliers that do not vanish on ``active``, for those samples where there are such."""
    largest = multipliers.abs().amax(-1, keepdim=True)
    lacking = (active & (multipliers <= _WEAK * largest)).any(-1)
    allowed = 10 * fit.misfit(multipliers) + 1e-8 * fit.slope.norm(dim=-1)
    for least in _LEAST:
        if not bool(lacking.any()):
            break
        other = fit.solve(torch.where(active, least * largest, torch.zeros_like(multipliers)))
        found = lacking & (fit.misfit(other) <= allowed)
        multipliers = torch.where(found.unsqueeze(-1), other, multipliers)
        lacking = lacking & ~found
    return multipliers


@final
@dataclass(frozen=True)
class _Fit:
    """The least-squares problem for λ.

    Attributes
    ----------
    slope : Tensor of shape ``(B, n)``
    rows : Tensor of shape ``(B, k, n)``
    weights : Tensor of shape ``(B, k)``
    free : Tensor of bool, shape ``(B, k)``
        Multipliers of either sign.
    usable : Tensor of bool, shape ``(B, k)``
    """

    slope: Tensor
    rows: Tensor
    weights: Tensor
    free: Tensor
    usable: Tensor

    def misfit(self, multipliers: Tensor) -> Tensor:
        """‖∇f − Aᵀλ‖ of every sample."""
        return (self.slope - (multipliers.unsqueeze(-2) @ self.rows).squeeze(-2)).norm(dim=-1)

    def solve(self, least: Tensor) -> Tensor:
        """λ with λ ≥ ``least`` where it is not free."""
        slope = self.slope - (least.unsqueeze(-2) @ self.rows).squeeze(-2)
        taken, excess = self.usable, torch.zeros_like(least)
        for _ in range(_ROUNDS):
            excess = self._least_squares(slope, taken)
            negative = taken & ~self.free & (excess < 0)
            if not bool(negative.any()):
                break
            taken = taken & ~negative
        return least + torch.where(self.free, excess, excess.clamp_min(0.0))

    def _least_squares(self, slope: Tensor, taken: Tensor) -> Tensor:
        """min ‖slope − Aᵀλ‖² + Σ (w λ)² over the constraints that are taken; of least norm."""
        rows = self.rows
        lengths = rows.norm(dim=-1).clamp_min(torch.finfo(rows.dtype).tiny)
        units = torch.where(taken, 1.0 / lengths, torch.zeros_like(lengths))
        scaled = rows * units.unsqueeze(-1)  # rows of length 1, or zero
        penalty = torch.diag_embed(torch.where(taken, self.weights, torch.ones_like(lengths)))
        matrix = torch.cat([scaled.mT, penalty], -2)
        right = torch.cat([slope, torch.zeros_like(lengths)], -1)
        solution = torch.linalg.pinv(matrix, rtol=torch.finfo(rows.dtype).eps ** 0.75) @ right.unsqueeze(-1)
        return solution.squeeze(-1) * units
