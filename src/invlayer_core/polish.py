"""Polish: Newton steps on the conditions, after any solver, each kept only where it helps.

The accuracy of a gradient is capped by that of y*. Newton's method squares the error of a nearby
solution, so one or two steps take a solver's 1e-4 to machine precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.compressed import compressed_values, push
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.jacobians.pattern import SparsityPattern
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.linear.factor_bank import FactorBank, solve_with_values
from invlayer_core.linear.lu import has_lost_rank, lu_factor, lu_solve
from invlayer_core.linear.sparse_lu import SparseLU

__all__ = ["polish"]

_AUTO_STEPS = 10
_FLOOR = 16.0  # units in the last place of y: a residual that more steps would hardly lower
_RANK = 1e-10  # singular values up to this fraction of the largest count as zero in a step


@torch.no_grad()
def polish(
    system: System,
    y: Tensor,
    residual: Tensor,
    steps: int | Literal["auto"],
    method: object = None,
    *,
    theta: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Newton steps on F from ``y``.

    Parameters
    ----------
    system : System
    y : Tensor of shape ``(*batch, *event)``
    residual : Tensor
        F(y).
    steps : int or "auto"
        How many; ``"auto"`` stops when no sample gains any more, or all are within rounding of y.
    method : LinearSolver, optional
        That of the adjoint: with ``SparseLU`` and a pattern the steps are taken with sparse factors.
    theta : sequence of Tensor, optional
        In the place of the system's own.

    Returns
    -------
    y, residual : Tensor
        Where every sample's residual is no larger than before.
    kept : Tensor of int64, shape ``(*batch,)``
        How many steps helped each sample.
    """
    if y.numel() == 0:
        return y, residual, torch.zeros(system.shape.batch, dtype=torch.int64, device=y.device)
    equations = residual.numel() // max(1, system.shape.count)
    if equations != system.shape.size:
        raise ConditionsError(
            f"polish={steps!r}: the conditions give {equations} equations for {system.shape.size} unknowns; "
            "accepted are as many equations as unknowns. Leave polish at 0."
        )
    theta = [tensor.detach() for tensor in (system.theta if theta is None else theta)]
    kept = torch.zeros(system.shape.batch, dtype=torch.int64, device=y.device)
    for _ in range(_AUTO_STEPS if steps == "auto" else steps):
        moved = y - _newton_step(system, y, theta, residual, method)
        new = system.residual(moved, theta).detach()
        better = _size(system, new) < _size(system, residual)  # False for NaN
        y = torch.where(_like(better, y), moved, y)
        residual = torch.where(_like(better, residual), new, residual)
        kept = kept + better
        if steps == "auto":
            floor = _FLOOR * torch.finfo(y.dtype).eps * (1.0 + system.shape.vectors(y).abs().amax(-1))
            if not bool(_functorch.plain(better & ~(_size(system, residual) <= floor)).any()):
                break
    return y, residual, kept


def _newton_step(
    system: System, y: Tensor, theta: Sequence[Tensor], residual: Tensor, method: object
) -> Tensor:
    linearization = linearize(system, y.detach(), theta)
    if isinstance(method, SparseLU) and method.known_pattern is not None:
        return _sparse_step(linearization, residual, method, method.known_pattern).reshape(y.shape)
    blocks = per_sample_blocks(linearization).detach()
    flat = residual.reshape(blocks.shape[:-1]).to(blocks.dtype)
    factors = lu_factor(blocks)
    step = lu_solve(blocks, flat, factors)
    singular = _functorch.plain(has_lost_rank(factors))
    if bool(singular.any()) and not _functorch.is_active():  # a root that is not isolated: the nearest one
        rows = singular.nonzero().reshape(-1)
        nearest = torch.linalg.pinv(torch.nan_to_num(blocks[rows]), rtol=_RANK) @ flat[rows].unsqueeze(-1)
        step = step.index_copy(0, rows, nearest.squeeze(-1))
    return step.reshape(y.shape)


def _sparse_step(
    linearization: Linearization, residual: Tensor, method: SparseLU, pattern: SparsityPattern
) -> Tensor:
    bank = FactorBank()
    bank.pattern = pattern
    values = compressed_values(linearization, pattern)
    flat = residual.reshape(linearization.system.shape.count, pattern.shape[0])
    step = solve_with_values(bank, method, values, flat, transpose=False)
    missing = flat - push(linearization, step)  # a direct solver may be inexact: a refinement is cheaper than
    return step + solve_with_values(bank, method, values, missing, transpose=False)  # one step more


def _size(system: System, residual: Tensor) -> Tensor:
    """‖F‖∞ of every sample, ``(*batch,)``."""
    return system.shape.vectors(residual).abs().amax(-1)


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1 for _ in range(tensor.ndim - mask.ndim)))
