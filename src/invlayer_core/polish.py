"""Polish: Newton steps on the conditions, after any solver, each kept only where it helps.

The accuracy of a gradient is capped by that of y*. Newton's method squares the error of a nearby
solution, so one or two steps take a solver's 1e-4 to machine precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.compressed import compressed_values, given_entries
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.linear.factor_bank import FactorBank, solve_with_values
from invlayer_core.linear.lu import has_lost_rank, lu_factor, lu_solve
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.solvers.direct import Factor

__all__ = ["Polished", "polish"]

_AUTO_STEPS = 10
_FLOOR = 16.0  # units in the last place of y: a residual that more steps would hardly lower
_NEARBY = 1e-3  # size of a last step, beside y, whose factor still serves the derivative
_RANK = 1e-10  # singular values up to this fraction of the largest count as zero in a step


@final
class Polished(NamedTuple):
    """What Newton steps have led to.

    Attributes
    ----------
    y, residual : Tensor
        Where every sample's residual is no larger than before.
    kept : Tensor of int64, shape ``(*batch,)``
        How many steps helped each sample.
    factors : tuple of Factor or None
        The sparse factors of the last step, one per sample: those of J at, or close to, y. Empty if the
        steps were dense.
    """

    y: Tensor
    residual: Tensor
    kept: Tensor
    factors: tuple[Factor | None, ...] = ()


@torch.no_grad()
def polish(
    system: System, y: Tensor, residual: Tensor, steps: int | Literal["auto"], method: object = None
) -> Polished:
    """Newton steps on F from ``y``.

    Parameters
    ----------
    system : System
    y : Tensor of shape ``(*batch, *event)``
    residual : Tensor
        F(y).
    steps : int or "auto"
        How many; ``"auto"`` stops for each sample when it gains no more, or is within rounding of y.
    method : LinearSolver, optional
        That of the adjoint: with ``SparseLU`` and a pattern the steps are taken with sparse factors.
    """
    if y.numel() == 0:
        return Polished(y, residual, torch.zeros(system.shape.batch, dtype=torch.int64, device=y.device))
    equations = residual.numel() // max(1, system.shape.count)
    if equations != system.shape.size:
        raise ConditionsError(
            f"polish={steps!r}: the conditions give {equations} equations for {system.shape.size} unknowns; "
            "accepted are as many equations as unknowns. Leave polish at 0."
        )
    kept = torch.zeros(system.shape.batch, dtype=torch.int64, device=y.device)
    going = torch.ones_like(kept, dtype=torch.bool)
    for _ in range(_AUTO_STEPS if steps == "auto" else steps):  # one at least: 0 does not come here
        step, noise, factors = _newton_step(system, y, residual, method)
        moved = y - step
        new = system.residual(moved, system.theta).detach()
        better = going & (_size(system, new) < _size(system, residual))  # False for NaN
        y = torch.where(_like(better, y), moved, y)
        residual = torch.where(_like(better, residual), new, residual)
        kept = kept + better
        if steps == "auto":  # what has arrived stays as it is, however long others take
            floor = torch.finfo(y.dtype).eps * torch.maximum(_FLOOR * (1.0 + _size(system, y)), noise)
            going = better & ~(_size(system, residual) <= floor)
            if not bool(_functorch.plain(going).any()):
                break
    close = ~better | (_size(system, step) <= _NEARBY * (1.0 + _size(system, y)))
    return Polished(y, residual, kept, _where(close, factors))


def _where(mask: Tensor, factors: Sequence[Factor | None]) -> tuple[Factor | None, ...]:
    """The factors of some samples, None for the others; none at all, if there are none."""
    if not factors:
        return ()
    return tuple(f if kept else None for f, kept in zip(factors, mask.reshape(-1).tolist(), strict=True))


@final
class _Step(NamedTuple):
    """J⁻¹ F; how large |J| |y| is, ``(*batch,)``, whose rounding errors F has; sparse factors, if any."""

    step: Tensor
    terms: Tensor
    factors: tuple[Factor | None, ...]


def _newton_step(system: System, y: Tensor, residual: Tensor, method: object) -> _Step:
    theta = [tensor.detach() for tensor in system.theta]
    if isinstance(method, SparseLU) and method.known_pattern is not None:
        return _sparse_step(system, y.detach(), theta, residual, method)
    blocks = per_sample_blocks(linearize(system, y.detach(), theta)).detach()
    flat = residual.reshape(blocks.shape[:-1]).to(blocks.dtype)
    factors = lu_factor(blocks)
    step = lu_solve(blocks, flat, factors)
    singular = _functorch.plain(has_lost_rank(factors))
    if bool(singular.any()) and not _functorch.is_active():  # a root that is not isolated: the nearest one
        rows = singular.nonzero().reshape(-1)
        nearest = torch.linalg.pinv(torch.nan_to_num(blocks[rows]), rtol=_RANK) @ flat[rows].unsqueeze(-1)
        step = step.index_copy(0, rows, nearest.squeeze(-1))
    sizes = blocks.abs() @ y.abs().reshape(flat.shape).to(blocks.dtype).unsqueeze(-1)
    return _Step(step.reshape(y.shape), _size(system, sizes.reshape(residual.shape)), ())


def _sparse_step(
    system: System, y: Tensor, theta: Sequence[Tensor], residual: Tensor, method: SparseLU
) -> _Step:
    bank, pattern = FactorBank(), method.known_pattern
    assert pattern is not None
    bank.pattern = pattern
    values = given_entries(system, y, theta, pattern)
    if values is None:
        values = compressed_values(linearize(system, y, theta), pattern)
    flat, point = (t.reshape(system.shape.count, system.shape.size) for t in (residual, y))
    step = solve_with_values(bank, method, values, flat, transpose=False)
    missing = flat - pattern.product(values, step)  # a direct solver may be inexact: a refinement is cheaper
    step = step + solve_with_values(bank, method, values, missing, transpose=False)  # than one step more
    terms = _size(system, pattern.product(values.abs(), point.abs()).reshape(residual.shape))
    return _Step(step.reshape(y.shape), terms, () if _functorch.is_active() else tuple(bank.factors))


def _size(system: System, tensor: Tensor) -> Tensor:
    """‖·‖∞ of every sample, ``(*batch,)``."""
    return system.shape.vectors(tensor).abs().amax(-1)


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1 for _ in range(tensor.ndim - mask.ndim)))
