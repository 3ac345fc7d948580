"""Polish: Newton steps on the conditions, after any solver, each kept only where it helps.

The accuracy of a gradient is capped by that of y*. Newton's method squares the error of a nearby
solution, so one or two steps take a solver's 1e-4 to machine precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_AUTO_STEPS = 20  # every second with the J of the one before
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
    system: System,
    y: Tensor,
    residual: Tensor,
    steps: int | Literal["auto"],
    method: object = None,
    *,
    theta: Sequence[Tensor] | None = None,
) -> Polished:
    """Newton steps on F from ``y``.

    Parameters
    ----------
    system : System
    y : Tensor of shape ``(*batch, *event)``
    residual : Tensor
        F(y).
    steps : int or "auto"
        How many; ``"auto"`` stops for each sample when it gains no more, or is within rounding of y, and
        takes every second step with the J of the one before (Traub 1964, of order 3 in pairs).
    method : LinearSolver, optional
        That of the adjoint: with ``SparseLU`` and a pattern the steps are taken with sparse factors.
    theta : sequence of Tensor, optional
        In the place of the system's own.
    """
    if y.numel() == 0:
        return Polished(y, residual, torch.zeros(system.shape.batch, dtype=torch.int64, device=y.device))
    equations = residual.numel() // max(1, system.shape.count)
    if equations != system.shape.size:
        raise ConditionsError(
            f"polish={steps!r}: the conditions give {equations} equations for {system.shape.size} unknowns; "
            "accepted are as many equations as unknowns. Leave polish at 0."
        )
    theta = [tensor.detach() for tensor in (system.theta if theta is None else theta)]
    kept = torch.zeros(system.shape.batch, dtype=torch.int64, device=y.device)
    going = torch.ones_like(kept, dtype=torch.bool)
    inverse: _Inverse | None = None
    for _ in range(_AUTO_STEPS if steps == "auto" else steps):  # one at least: 0 does not come here
        chord = inverse is not None
        used = inverse or _inverse_at(system, y, theta, residual, method)
        inverse = used if steps == "auto" and not chord else None
        step = used.apply(residual.reshape(system.shape.count, system.shape.size)).reshape(y.shape)
        moved = y - step
        new = system.residual(moved, theta).detach()
        better = going & (_size(system, new) < _size(system, residual))  # False for NaN
        y = torch.where(_like(better, y), moved, y)
        residual = torch.where(_like(better, residual), new, residual)
        kept = kept + better
        if steps == "auto":  # what has arrived stays as it is, however long others take
            floor = torch.finfo(y.dtype).eps * torch.maximum(_FLOOR * (1.0 + _size(system, y)), used.terms)
            going = (better | (going & chord)) & ~(_size(system, residual) <= floor)
            if not bool(_functorch.plain(going).any()):
                break
    close = ~better | (_size(system, step) <= _NEARBY * (1.0 + _size(system, y)))
    return Polished(y, residual, kept, _where(close, used.factors))


def _where(mask: Tensor, factors: Sequence[Factor | None]) -> tuple[Factor | None, ...]:
    """The factors of some samples, None for the others; none at all, if there are none."""
    if not factors:
        return ()
    return tuple(f if kept else None for f, kept in zip(factors, mask.reshape(-1).tolist(), strict=True))


@final
class _Inverse(NamedTuple):
    """J⁻¹ on vectors ``(B, n)``, and what else is known of J.

    ``terms`` is how large |J| |y| is, ``(*batch,)``, whose rounding errors F has; ``factors`` are the sparse
    ones, if any.
    """

    apply: Callable[[Tensor], Tensor]
    terms: Tensor
    factors: tuple[Factor | None, ...]


def _inverse_at(
    system: System, y: Tensor, theta: Sequence[Tensor], residual: Tensor, method: object
) -> _Inverse:
    if isinstance(method, SparseLU) and method.known_pattern is not None:
        return _sparse_inverse(system, y.detach(), theta, residual, method)
    blocks = per_sample_blocks(linearize(system, y.detach(), theta)).detach()
    factors = lu_factor(blocks)
    singular = _functorch.plain(has_lost_rank(factors))
    nearest: tuple[Tensor, Tensor] | None = None
    if bool(singular.any()) and not _functorch.is_active():  # a root that is not isolated: the nearest one
        rows = singular.nonzero().reshape(-1)
        nearest = rows, torch.linalg.pinv(torch.nan_to_num(blocks[rows]), rtol=_RANK)

    def apply(rhs: Tensor) -> Tensor:
        rhs = rhs.to(blocks.dtype)
        step = lu_solve(blocks, rhs, factors)
        if nearest is None:
            return step
        rows, inverse = nearest
        return step.index_copy(0, rows, (inverse @ rhs[rows].unsqueeze(-1)).squeeze(-1))

    sizes = blocks.abs() @ y.abs().reshape(blocks.shape[:-1]).to(blocks.dtype).unsqueeze(-1)
    return _Inverse(apply, _size(system, sizes.reshape(residual.shape)), ())


def _sparse_inverse(
    system: System, y: Tensor, theta: Sequence[Tensor], residual: Tensor, method: SparseLU
) -> _Inverse:
    bank, pattern = FactorBank(), method.known_pattern
    assert pattern is not None
    bank.pattern = pattern
    given = given_entries(system, y, theta, pattern)
    known = compressed_values(linearize(system, y, theta), pattern) if given is None else given

    def apply(rhs: Tensor) -> Tensor:
        # A direct solver may be inexact: a refinement is cheaper than one step more.
        step = solve_with_values(bank, method, known, rhs, transpose=False)
        missing = rhs - pattern.product(known, step)
        return step + solve_with_values(bank, method, known, missing, transpose=False)

    if not _functorch.is_active():
        bank.factorise(method, known)
    point = y.reshape(system.shape.count, system.shape.size)
    terms = _size(system, pattern.product(known.abs(), point.abs()).reshape(residual.shape))
    return _Inverse(apply, terms, () if _functorch.is_active() else tuple(bank.factors))


def _size(system: System, tensor: Tensor) -> Tensor:
    """‖·‖∞ of every sample, ``(*batch,)``."""
    return system.shape.vectors(tensor).abs().amax(-1)


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1 for _ in range(tensor.ndim - mask.ndim)))
