"""A Jacobian that the user wrote, beside that of autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import blocks_by_columns, per_sample_blocks

__all__ = ["given_and_taken", "jacobian_errors", "wrong_entry"]


def given_and_taken(
    system: System, function: str, jacobian: str, y: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Two parts of a system: the Jacobian of one, and what the other says it is; both ``(B, m, n)``.

    Raises
    ------
    ConditionsError
        If the shapes differ.
    """
    linearization = linearize(system.of_part(function), y.detach(), theta)
    tall = linearization.value.numel() > y.numel()
    taken = (blocks_by_columns if tall else per_sample_blocks)(linearization).detach()
    with torch.no_grad():
        given = system.of_part(jacobian).residual(y.detach(), [tensor.detach() for tensor in theta])
    accepted = (*system.shape.batch, *taken.shape[1:])
    if not isinstance(given, Tensor) or given.shape != accepted:
        came = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ConditionsError(
            f"jacobian= returned {came}; accepted is a tensor of shape {accepted}: one row per residual, and "
            "one column per unknown (per coordinate of the chart, on a manifold)."
        )
    return given.reshape(taken.shape), taken


def jacobian_errors(given: Tensor, taken: Tensor) -> Tensor:
    """The largest error of each sample's Jacobian, relative to its largest entry; ``(B,)``."""
    size = taken.abs().amax((-2, -1)).clamp_min(torch.finfo(taken.dtype).tiny)
    return (given - taken).abs().amax((-2, -1)) / size


def wrong_entry(given: Tensor, taken: Tensor) -> str:
    """Where the largest error is, and what stands there."""
    gap = (given - taken).abs().nan_to_num(torch.inf)
    place = int(gap.argmax())
    sample, row, column = (int(i) for i in torch.unravel_index(torch.tensor(place), gap.shape))
    ours, theirs = float(taken[sample, row, column]), float(given[sample, row, column])
    return (
        f"of residual {row} by unknown {column} in sample {sample} it says {theirs:.6g}, autograd {ours:.6g}"
    )
