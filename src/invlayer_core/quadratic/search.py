"""The search for an active set that its own solution proves."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram, program_of_sample
from invlayer_core.linear.saddle_point.bank import SaddleBank
from invlayer_core.quadratic.sides import SIGN, WEAK, Judged, judge, snapped

__all__ = ["Certified", "Search"]


@final
class Certified(NamedTuple):
    """What is known of the active set of every sample; each ``(B,)``.

    Attributes
    ----------
    z : Tensor of shape ``(B, N)``
        With zeros for the multipliers of all constraints that are not active.
    ambiguous : Tensor of bool
        Where a constraint is active with a multiplier of zero, or no set could be proved.
    rounds : Tensor of int64
        How many systems were solved.
    """

    z: Tensor
    ambiguous: Tensor
    rounds: Tensor


@final
class Search:
    """The primal-dual active-set method, from the sets that a solver's answer suggests."""

    def __init__(
        self,
        program: QuadraticProgram,
        z: Tensor,
        active: Tensor,
        margin: Tensor,
        wanted: Tensor,
        rounds: int,
        bank: SaddleBank | None,
    ) -> None:
        self.layout = program.layout
        self.program, self.bank, self.rounds = program, bank, rounds
        self.given, self.active, self.wanted = z, active, wanted
        self.margin = margin

    def run(self) -> Certified:
        n, equalities = self.layout.size, self.layout.equalities
        exempt = None if bool(self.wanted.all()) else ~self.wanted
        bank = SaddleBank() if self.bank is None else self.bank
        step = _solve_on(self.program, self.active, exempt, self.given, bank)
        proved = step.proved & self.wanted
        z = torch.where(proved.unsqueeze(-1), step.z, snapped(self.given, self.active, n, equalities))
        ambiguous = torch.where(proved, step.weak, self.wanted)
        rounds = self.wanted.long()
        left = (self.wanted & ~step.proved).reshape(-1).nonzero().reshape(-1).tolist()
        if left:
            z, ambiguous, rounds = z.clone(), ambiguous.clone(), rounds.clone()
            flat = z.reshape(-1, z.shape[-1]), ambiguous.reshape(-1), rounds.reshape(-1)
            for index in left:
                self._search_one(index, step, *flat)
            z, ambiguous, rounds = (
                t.reshape(like.shape) for t, like in zip(flat, (z, ambiguous, rounds), strict=True)
            )
        if exempt is not None:
            ambiguous = ambiguous | (exempt & (self.margin <= WEAK))
        return Certified(z, ambiguous, rounds)

    def _search_one(self, index: int, first: _Step, z: Tensor, ambiguous: Tensor, rounds: Tensor) -> None:
        """Go on with one sample, apart from the others, so that none depends on them."""
        alone = self.bank if self.given.shape[:-1].numel() == 1 else None
        program = program_of_sample(self.program, self.given.shape[:-1], index)
        given = self.given.reshape(-1, self.given.shape[-1])[index : index + 1]
        active = first.next_active.reshape(-1, first.next_active.shape[-1])[index : index + 1]
        if alone is not None:  # in the very shape of the call, so that its factors serve the derivative
            program, given, active = self.program, self.given, first.next_active
        seen = set()
        for count in range(2, self.rounds + 1):
            step = _solve_on(program, active, None, given, SaddleBank() if alone is None else alone)
            rounds[index] = count
            if bool(step.proved.all()):
                z[index] = step.z.reshape(-1)
                ambiguous[index] = bool(step.weak.all())
                return
            key = active.cpu().numpy().tobytes()
            active = step.worst_flipped if key in seen or count > 8 else step.next_active
            seen.add(key)


@final
class _Step(NamedTuple):
    """The solution on supposed active sets, and what it says about them."""

    z: Tensor
    proved: Tensor
    weak: Tensor
    next_active: Tensor
    worst_flipped: Tensor


def _solve_on(
    program: QuadraticProgram, active: Tensor, exempt: Tensor | None, given: Tensor, bank: SaddleBank
) -> _Step:
    n, equalities = program.layout.size, program.layout.equalities
    factors = bank.factorise(program, active, exempt)
    shape = (1, active.shape[:-1].numel(), given.shape[-1])
    found = factors.solve(program.right_hand_side(given).reshape(shape))
    z = found.w.reshape(given.shape)
    judged = judge(program, z, active)
    again = found.singular.reshape(judged.proved.shape) & ~judged.proved
    if bool(again.any()):  # multipliers are not unique: look near those of the solver
        start = torch.cat(
            [given[..., :n], torch.where(active, given[..., n:], torch.zeros_like(given[..., n:]))], -1
        )
        left = program.right_hand_side(given) - _applied(program, start)
        moved = start + factors.solve(left.reshape(shape)).w.reshape(given.shape)
        other = judge(program, moved, active)
        better = (again & other.proved).unsqueeze(-1)
        z = torch.where(better, moved, z)
        judged = Judged(*(torch.where(better if a.ndim == z.ndim else better.squeeze(-1), b, a)
                           for a, b in zip(judged, other, strict=True)))  # fmt: skip
    wrong = judged.violation > SIGN
    next_active = active ^ wrong
    worst = torch.zeros_like(active)
    if active.shape[-1]:
        worst.scatter_(-1, judged.violation.argmax(-1, keepdim=True), value=True)
    return _Step(
        snapped(z, active, n, equalities),
        judged.proved,
        (judged.margin <= WEAK) | found.loose.reshape(judged.proved.shape),
        next_active,
        active ^ (worst & wrong),
    )


def _applied(program: QuadraticProgram, z: Tensor) -> Tensor:
    """K z."""
    x, multipliers = program.split(z)
    reaction = program.reaction(multipliers)
    top = program.curvature(x)
    return torch.cat([top if reaction is None else top + reaction, program.constraints(x)], -1)
