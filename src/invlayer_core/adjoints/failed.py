"""Keep failed samples from spoiling the derivatives of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.recorded import with_derivative_of
from invlayer_core.conditions.system import System

__all__ = ["out_of_harm", "recorded_out_of_harm"]


def out_of_harm(
    system: System, y: Tensor, dead: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Where F can be linearised without NaN from failed samples reaching shared parameters.

    A failed sample gets the y and the args of a good one; its rows of the derivative are then multiplied
    by zero, and 0 · finite = 0. Which args have rows of samples is not guessed but tried: one stays
    swapped only if no good sample's residual changes by it, to the last bit. What then is still NaN in θ
    becomes 1: only failed samples can depend on it. Infinity stays: it may be a bound that is not there.
    """
    good = torch.argmin(dead.reshape(-1).to(torch.uint8)).reshape(1)
    safe = _swap_rows(y, dead, good)
    safe = torch.where(safe.isfinite(), safe, torch.ones_like(safe))
    tamed = [_number(tensor) for tensor in theta]
    reference = _good_residual(system, safe, tamed, dead)
    for i, tensor in enumerate(theta):
        if not _is_inexact(tensor) or tensor.shape[: dead.ndim] != dead.shape or dead.ndim == 0:
            continue
        trial = [*tamed[:i], _number(_swap_rows(tensor, dead, good)), *tamed[i + 1 :]]
        residual = _good_residual(system, safe, trial, dead)
        if torch.equal(_functorch.plain(residual), _functorch.plain(reference)):
            tamed = trial
    return safe, tamed


def recorded_out_of_harm(
    system: System, y: Tensor, dead: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As :func:`out_of_harm`, for autograd to record: the derivative of a row stays with its own sample."""
    safe, tamed = out_of_harm(system, y.detach(), dead, [tensor.detach() for tensor in theta])
    pairs = zip(theta, tamed, strict=True)
    return safe, tuple(with_derivative_of(own, value) if _is_inexact(own) else own for own, value in pairs)


def _swap_rows(tensor: Tensor, dead: Tensor, good: Tensor) -> Tensor:
    """The rows of failed samples replaced by that of a good one."""
    rows = tensor.reshape(dead.numel(), -1)
    donor = torch.index_select(rows, 0, good)
    return torch.where(dead.reshape(-1, 1), donor, rows).reshape(tensor.shape)


def _number(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isnan(), 1.0, tensor) if _is_inexact(tensor) else tensor


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@torch.no_grad()
def _good_residual(system: System, y: Tensor, theta: Sequence[Tensor], dead: Tensor) -> Tensor:
    """F of the good samples; zero for the failed ones."""
    residual = system.residual(y.detach(), [tensor.detach() for tensor in theta])
    mask = dead.reshape(*dead.shape, *(1 for _ in range(residual.ndim - dead.ndim)))
    return torch.where(mask, torch.zeros_like(residual), residual)
