"""Certify the active set of a quadratic program, and polish its solution, after any solver.

The derivative of a quadratic program is that of its active constraints, and a solver at accuracy 1e-6 does
not tell which they are: a slack of 1e-7 may be zero or not. What does is the system of the supposed active
set: its solution is exact, and either all its multipliers are positive and all other constraints hold, which
proves the set right (the problem is convex), or those that are not name the mistake. Putting them right and
solving again is the primal-dual active-set method, Newton's on the semismooth conditions (Hintermüller, Ito &
Kunisch, SIAM J. Optim. 2003); from a solver's answer it takes a step or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticLayout, QuadraticProgram, measure
from invlayer_core.execution.forward import AroundForward, Forward
from invlayer_core.execution.outcome import Outcome
from invlayer_core.linear.saddle_point.bank import SaddleBank
from invlayer_core.quadratic.search import Certified, Search
from invlayer_core.quadratic.sides import (
    CLEAR,
    EXACT,
    WEAK,
    largest_error,
    least_margin,
    looks_active,
    snapped,
)
from invlayer_core.solvers.contract import Status

__all__ = ["PolishedForward", "certify"]

_HOPELESS = 1e-2  # relative error from which a solution that its solver disowns is not looked at
_ROUNDS = 30


@final
@dataclass(frozen=True)
class PolishedForward(AroundForward):
    """A forward for quadratic programs, with its active set certified and its solution polished.

    Attributes
    ----------
    inner : Forward
        Gives z in the order of the layout; NaN stands for a multiplier that the solver does not tell.
    layout : QuadraticLayout
    rounds : int or "auto"
        How many systems may be solved; 0 takes the sides of the constraints as they look.
    bank : SaddleBank or None
        Where the last factors are kept for the derivative.
    exact : float
        Relative error of a solution that needs no polish.
    """

    inner: Forward
    layout: QuadraticLayout
    rounds: int | Literal["auto"] = "auto"
    bank: SaddleBank | None = None
    exact: float = EXACT

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        z, outcome = self.inner.run(tensors)
        program = self.layout.program(tensors[: len(self.layout.names)])
        rounds = _ROUNDS if self.rounds == "auto" else self.rounds
        claimed = outcome.status.reshape(z.shape[:-1]) == int(Status.CONVERGED)
        found = certify(program, z, claimed, rounds, self.bank, self.exact)
        return found.z, replace(outcome, y=found.z, aux=_with_findings(outcome, found, self.layout))

    def mapped(self, size: int, dims: Sequence[int | None]) -> PolishedForward:
        return replace(self, inner=self.inner.mapped(size, dims), bank=None)

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        return self.inner.moved(tensors, dims, size)


def _with_findings(outcome: Outcome, found: Certified, layout: QuadraticLayout) -> tuple[Any, ...]:
    """The solver's aux, one mapping per sample, and what was found about the active set beside it."""
    count = found.ambiguous.numel()
    given = outcome.aux if len(outcome.aux) == count else ({},) * count
    first = layout.size + layout.equalities
    active = (found.z.reshape(count, found.z.shape[-1])[:, first:] > 0).sum(-1).tolist()
    rows = zip(
        given, found.ambiguous.reshape(-1).tolist(), active, found.rounds.reshape(-1).tolist(), strict=True
    )
    return tuple(
        {**aux, "ambiguous": ambiguous, "active": number, "systems": rounds}
        for aux, ambiguous, number, rounds in rows
    )


@torch.no_grad()
def certify(
    program: QuadraticProgram,
    z: Tensor,
    claimed: Tensor,
    rounds: int,
    bank: SaddleBank | None = None,
    exact: float = EXACT,
) -> Certified:
    """The active set of every sample, proved where it can be, and z as exactly as it gives it.

    Parameters
    ----------
    program : QuadraticProgram
    z : Tensor of shape ``(*batch, N)``
    claimed : Tensor of bool, shape ``(*batch,)``
        Whether the solver says that z is a solution.
    rounds : int
    bank : SaddleBank, optional
    exact : float
        Relative error of a z that stays as it is.
    """
    equalities, n = program.layout.equalities, program.layout.size
    z, told = _without_gaps(z, n)
    state = measure(program, z)
    none = torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)
    if z.numel() == 0:
        return Certified(z, none, none.long())
    active = looks_active(state, equalities, told)
    error, margin = largest_error(state, active), least_margin(program, state)
    finite = z.isfinite().all(-1) & error.isfinite() & (claimed | (error <= _HOPELESS))
    wanted = finite & ~((error <= exact) & (margin >= CLEAR))
    if not rounds or not bool(wanted.any()):
        unclear = finite & (margin <= torch.clamp(10 * error, min=WEAK))
        return Certified(snapped(z, active, n, equalities), unclear, none.long())
    return Search(program, z, active, margin, wanted, rounds, bank).run()


def _without_gaps(z: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """z with zeros for the multipliers that the solver does not tell, and which it does."""
    unknown = z[..., n:].isnan() & z[..., :n].isfinite().all(-1, keepdim=True)
    if not bool(unknown.any()):
        return z, None
    filled = torch.where(unknown, torch.zeros_like(z[..., n:]), z[..., n:])
    return torch.cat([z[..., :n], filled], -1), ~unknown
