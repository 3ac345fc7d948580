"""Residuals weighed and made robust: what goes into ``least_squares``, as functions of residuals.

A least-squares solver minimises ½‖r‖². For another loss ½ρ(‖r‖²) it is given r √(ρ(s)/s), s = ‖r‖², whose
half square that is: any solver then takes it, with its true Jacobian, and derivatives are those of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError

__all__ = ["huber", "weighted", "welsch"]


def weighted(residuals: Tensor, weight: Tensor | float, *, matrix: bool = False) -> Tensor:
    """Residuals times their weight, for ½ rᵀ WᵀW r.

    Parameters
    ----------
    residuals : Tensor of shape ``(*batch, m)``
    weight : Tensor or float
        W: a number, ``(m,)`` or ``(*batch, m)``.
    matrix : bool
        Whether W is ``(m, m)`` or ``(*batch, m, m)`` instead: a square root of the information matrix.

    Examples
    --------
    >>> weighted(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]), matrix=True)
    tensor([2., 3.])
    """
    if not matrix:
        return residuals * weight
    return (torch.as_tensor(weight).to(residuals) @ residuals.unsqueeze(-1)).squeeze(-1)


def huber(residuals: Tensor, radius: Tensor | float, *, joint: bool = False) -> Tensor:
    """Residuals whose half square is quadratic up to ``radius`` and linear beyond.

    ρ(s) = s for √s ≤ k, else 2k√s − k² (Huber, Robust Estimation of a Location Parameter, 1964).

    Parameters
    ----------
    residuals : Tensor of shape ``(*batch, m)``
    radius : Tensor or float
        k, positive; may carry a gradient.
    joint : bool
        Whether the m residuals are one vector, such as the two coordinates of a point, and lose their weight
        together; else each has a loss of its own.

    Raises
    ------
    ConditionsError
        If ``radius`` is a number and not positive.

    Examples
    --------
    >>> 0.5 * huber(torch.tensor([0.5, 10.0]), radius=1.0).square()
    tensor([0.1250, 9.5000])
    """
    _check("huber", "radius", radius)
    squares = _squares(residuals, joint)
    outside = squares > radius * radius
    safe = torch.where(outside, squares, torch.ones_like(squares) * radius * radius)
    ratio = (2 * radius * safe.sqrt() - radius * radius) / safe
    return residuals * torch.where(outside, ratio, torch.ones_like(ratio)).sqrt()


def welsch(residuals: Tensor, scale: Tensor | float, *, joint: bool = False) -> Tensor:
    """Residuals whose half square levels off, so that what is far out does not count at all.

    ρ(s) = c² (1 − exp(−s/c²)) (Dennis & Welsch, Techniques for nonlinear least squares and robust regression,
    1978). It is not convex: start near.

    Parameters
    ----------
    residuals, joint
        As in :func:`huber`.
    scale : Tensor or float
        c, positive; may carry a gradient.

    Examples
    --------
    >>> (0.5 * welsch(torch.tensor([0.01, 10.0]), scale=1.0).square() * 1e4).round()
    tensor([1.0000e+00, 5.0000e+03])
    """
    _check("welsch", "scale", scale)
    ratio = _squares(residuals, joint) / (scale * scale)
    near = ratio < 1e-3
    far = torch.where(near, torch.ones_like(ratio), ratio)
    # (1 − e⁻ᵘ)/u, by its series where that would be 0/0: the next term is u⁵/720.
    series = 1 - ratio / 2 * (1 - ratio / 3 * (1 - ratio / 4 * (1 - ratio / 5)))
    return residuals * torch.where(near, series, -torch.expm1(-far) / far).sqrt()


def _squares(residuals: Tensor, joint: bool) -> Tensor:
    squares = residuals.square()
    return squares.sum(-1, keepdim=True) if joint else squares


def _check(called: str, name: str, value: Tensor | float) -> None:
    if not isinstance(value, Tensor) and not value > 0:
        raise ConditionsError(
            f"{called}({name}={value!r}): accepted is a number above 0, or a tensor of them."
        )
