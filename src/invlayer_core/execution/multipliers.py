"""Multipliers of a constrained minimum, from the point alone.

At a minimum ∇f = Aᵀλ, where the rows of A are the gradients of the constraints, λ vanishes where there is
slack, and is not negative but for equalities. So λ is estimated as the minimiser of

    ‖∇f − Aᵀλ‖² + Σ (wᵢ λᵢ)²,   wᵢ proportional to the slack,

(Glad & Polak 1979, equation 7), again without those inequalities whose multiplier came out negative. The
estimate is as accurate as the point; polishing makes both exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["estimate_multipliers"]

_SLACK = 1e-3  # a constraint with as much slack, relative to 1 + |y|, weighs as much as its gradient
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
    free = torch.arange(k, device=slack.device) < equal
    size = 1 + y.abs().amax(-1, keepdim=True)
    lengths = jacobian.norm(dim=-1).clamp_min(torch.finfo(slope.dtype).tiny)  # in the units of the slack
    weights = torch.where(free, 0.0, slack.abs() / (_SLACK * size)).nan_to_num(nan=0.0, posinf=1e300)
    taken = free | slack.isfinite()
    rows = torch.nan_to_num(jacobian, posinf=0.0, neginf=0.0)
    multipliers = slack.new_zeros(slack.shape)
    for _ in range(_ROUNDS):
        multipliers = _least_squares(torch.nan_to_num(slope), rows, weights.clamp_max(1e4), lengths, taken)
        negative = taken & ~free & (multipliers < 0)
        if not bool(negative.any()):
            break
        taken = taken & ~negative
    return torch.where(free, multipliers, multipliers.clamp_min(0.0))


def _least_squares(slope: Tensor, rows: Tensor, weights: Tensor, lengths: Tensor, taken: Tensor) -> Tensor:
    """min ‖slope − rowsᵀλ‖² + Σ (w λ)² over the constraints that are taken; of least norm."""
    units = torch.where(taken, rows.new_ones(()) / lengths, rows.new_zeros(()))
    scaled = rows * units.unsqueeze(-1)  # rows of length 1, or zero
    penalty = torch.diag_embed(torch.where(taken, weights, rows.new_ones(())))
    matrix = torch.cat([scaled.mT, penalty], -2)
    right = torch.cat([slope, torch.zeros_like(weights)], -1)
    solution = torch.linalg.pinv(matrix, rtol=torch.finfo(rows.dtype).eps ** 0.75) @ right.unsqueeze(-1)
    return solution.squeeze(-1) * units
