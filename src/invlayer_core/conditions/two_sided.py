"""Complementarity of two-sided constraints lower ≤ c ≤ upper, each with one multiplier μ.

Where μ is positive at an upper bound and negative at a lower one, c and μ fit if and only if the *natural
residual* vanishes (Facchinei & Pang 2003, section 1.5):

    c − Π(c + s μ) = 0,      Π the projection on [lower, upper],  s > 0 a length per multiplier.

It is c − upper where c + s μ lies above, c − lower where it lies below, and −s μ in between. Only one of the
two bounds can matter, and with σ = ±1 for the upper or the lower one, the row is −σ times the one-sided
complementarity of slack σ (bound − c) and multiplier σ μ: the active set, its test and its soft form are
those of ``kkt.py``. Which constraints are equations (lower = upper) may differ from sample to sample.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.kkt import Activity, complementarity

__all__ = ["two_sided_complementarity", "two_sided_weights"]


@final
class _Nearest(NamedTuple):
    """Of the bound that can matter; all but the bound are constants."""

    bound: Tensor
    side: Tensor  # 1 for the upper one, −1 for the lower one
    slack: Tensor
    scaled: Tensor
    active: Tensor


def _nearest(value: Tensor, scaled: Tensor, lower: Tensor, upper: Tensor) -> _Nearest:
    with torch.no_grad():
        moved = value + scaled
        on_upper = (moved > upper) | (~(moved < lower) & (scaled > 0))
        side = torch.where(on_upper, 1.0, -1.0).to(value)
    bound = torch.where(on_upper, upper, lower)
    with torch.no_grad():
        slack, scaled = side * (bound - value), side * scaled
        active = ~(slack >= scaled) | (lower == upper)  # NaN is active, so that it stays
    return _Nearest(bound, side, slack, scaled, active)


def two_sided_complementarity(
    value: Tensor, multiplier: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, activity: Activity
) -> Tensor:
    """The natural residual c − Π(c + s μ), ``(*batch, k)``; for an equation c − bound, whatever μ.

    Parameters
    ----------
    value, multiplier : Tensor of shape ``(*batch, k)``
        c and μ, in any units.
    scale : Tensor of shape ``(*batch, 1)``
        s, which makes a multiplier a length.
    lower, upper : Tensor of shape ``(*batch, k)``
        −∞ and ∞ where there is no bound.
    activity : {"exact", "soft", "full"}
        See :func:`~invlayer_core.conditions.kkt.complementarity`.
    """
    scaled = multiplier * scale
    bound, side, _, _, active = _nearest(value, scaled, lower, upper)
    gap = value - bound
    if activity == "exact":
        return torch.where(active, gap, -scaled)
    row = -side * complementarity(-side * gap, side * scaled, torch.ones_like(scale), activity)
    return torch.where(lower == upper, gap, row)


@torch.no_grad()
def two_sided_weights(
    value: Tensor, multiplier: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, activity: Activity
) -> Tensor:
    """θ of every row, ``(*batch, k)``, whose differential is θ (dc − dbound) − (1 − θ) s dμ.

    Parameters are those of :func:`two_sided_complementarity`, whose derivative this is; not for ``"full"``.
    """
    _, _, slack, scaled, active = _nearest(value, multiplier * scale, lower, upper)
    if activity == "exact":
        return active.to(value)
    total = slack + scaled
    known = slack.isfinite() & (total > 0)
    weight = torch.where(known, scaled / torch.where(known, total, 1.0), 0.0)
    return torch.where((lower == upper) | value.isnan(), torch.ones_like(weight), weight)
