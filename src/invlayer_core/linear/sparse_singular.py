"""Is J singular within the accuracy of y*? The test of ``singular.py``, without a dense matrix.

There the Newton–Kantorovich quantity h = ‖J⁻¹ (J(y + δ) − J(y))‖ is taken in full; here along the solution x.
A solution that is very large beside its right-hand side lies in the direction that J almost maps to zero
(or Jᵀ, for the transposed system), which is where h is largest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invlayer_core.jacobians.compressed import pull, push
from invlayer_core.jacobians.linearize import Linearization, linearize

__all__ = ["degenerate", "is_large"]

_SUSPICIOUS_GROWTH = 1e5
_SINGULAR_CHANGE = 0.1  # as in singular.py


def is_large(x: Tensor, rhs: Tensor) -> Tensor:
    """Samples ``(..., B)`` whose solution is very large beside its right-hand side."""
    limit = min(_SUSPICIOUS_GROWTH, 1e-2 / torch.finfo(rhs.dtype).eps)
    return x.abs().amax(-1) > limit * rhs.abs().amax(-1)


def degenerate(
    linearization: Linearization,
    x: Tensor,
    rhs: Tensor,
    apply: Callable[[Tensor, bool], Tensor],
    *,
    transpose: bool,
) -> Tensor:
    """Samples ``(..., B)`` with a large solution, and whose J changes by as much as itself near y*.

    Parameters
    ----------
    linearization : Linearization
    x, rhs : Tensor of shape ``(..., B, n)``
    apply : callable
        ``(b, transpose) -> J⁻¹ b`` or ``J⁻ᵀ b``.
    transpose : bool
        Whether x solves the transposed system.
    """
    system = linearization.system
    y, theta = linearization.y.detach(), [tensor.detach() for tensor in linearization.theta]
    residual = linearization.value.detach().reshape(system.shape.count, -1)
    directions = x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else x.unsqueeze(0)
    flat = y.reshape(system.shape.count, -1)
    noise = 4.0 * torch.finfo(y.dtype).eps * push(linearization, _uneven(flat)).abs()
    steps = [-2.0 * apply(residual, False)]
    steps += [apply(noise, False), apply(noise * torch.sign(directions[0]), False)]
    worst = torch.zeros_like(x.norm(dim=-1)).reshape(directions.shape[:-1])
    for step in steps:
        moved = linearize(
            system, (flat + torch.nan_to_num(step, 0.0, 0.0, 0.0)).reshape(system.shape.full), theta
        )
        changes = [_change(linearization, moved, each, apply, transpose) for each in directions]
        worst = torch.maximum(worst, torch.nan_to_num(torch.stack(changes), torch.inf))
    return (worst >= _SINGULAR_CHANGE).reshape(x.shape[:-1]) & is_large(x, rhs)


def _change(
    here: Linearization,
    there: Linearization,
    x: Tensor,
    apply: Callable[[Tensor, bool], Tensor],
    transpose: bool,
) -> Tensor:
    multiply = pull if transpose else push
    size = x.norm(dim=-1, keepdim=True)
    unit = x / torch.where(size == 0, torch.ones_like(size), size)
    return apply(multiply(there, unit) - multiply(here, unit), transpose).norm(dim=-1)


def _uneven(vectors: Tensor) -> Tensor:
    """Alternating signs and uneven weights, so that the terms of F do not cancel as they do in F itself."""
    steps = torch.arange(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    return vectors * (1.0 + 0.3 * torch.sin(steps)) * torch.where(steps % 2 == 0, 1.0, -1.0).to(vectors)
