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
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import (
    Measured,
    QuadraticLayout,
    QuadraticProgram,
    measure,
    program_of_sample,
)
from invlayer_core.constraints import ConstraintInfo
from invlayer_core.execution.forward import AroundForward, Forward
from invlayer_core.execution.outcome import Outcome
from invlayer_core.linear.saddle_bank import SaddleBank, make_saddle_point
from invlayer_core.matrices import DenseForm, SparseForm
from invlayer_core.solvers.contract import Status

__all__ = ["PolishedForward", "describe_active_set"]

_EXACT = 1e-11  # relative error of a solution that needs no polish
_CLEAR = 1e-7  # margin of a constraint whose side is beyond doubt at that error
_WEAK = 1e-9  # margin of a constraint, after polishing, that counts as weakly active
_SIGN = 1e-11  # a violation, relative, that rounding may have made
_HOPELESS = 1e-2  # relative error from which a solution that its solver disowns is not looked at
_ROUNDS = 30


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
    exact: float = _EXACT

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
    exact: float = _EXACT,
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
    active = _looks_active(state, equalities, told)
    error, margin = _error(state, active), _margin(program, state)
    finite = z.isfinite().all(-1) & error.isfinite() & (claimed | (error <= _HOPELESS))
    wanted = finite & ~((error <= exact) & (margin >= _CLEAR))
    if not rounds or not bool(wanted.any()):
        unclear = finite & (margin <= torch.clamp(10 * error, min=_WEAK))
        return Certified(_snapped(z, active, n, equalities), unclear, none.long())
    return _Search(program, z, active, margin, wanted, rounds, bank).run()


def _without_gaps(z: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """z with zeros for the multipliers that the solver does not tell, and which it does."""
    unknown = z[..., n:].isnan() & z[..., :n].isfinite().all(-1, keepdim=True)
    if not bool(unknown.any()):
        return z, None
    filled = torch.where(unknown, torch.zeros_like(z[..., n:]), z[..., n:])
    return torch.cat([z[..., :n], filled], -1), ~unknown


def _looks_active(state: Measured, equalities: int, told: Tensor | None) -> Tensor:
    active = state.weight > state.slack
    if told is not None:  # by the slack alone
        active = torch.where(told, active, state.slack <= 1e-5)
    active[..., :equalities] = True
    return active


def _error(state: Measured, active: Tensor) -> Tensor:
    """The largest relative violation of the conditions, ``(*batch,)``."""
    error = state.stationarity.abs().amax(-1)
    if not active.shape[-1]:
        return error
    return torch.maximum(error, torch.where(active, state.slack, state.weight).abs().amax(-1))


def _margin(program: QuadraticProgram, state: Measured) -> Tensor:
    """How clearly the least clear inequality is active or not, ``(*batch,)``."""
    layout, clear = program.layout, torch.maximum(state.slack, state.weight)
    if clear.shape[-1] == layout.equalities:
        return torch.full_like(state.stationarity[..., 0], torch.inf)
    fixed = _fixed(program)
    if fixed is not None:  # of two bounds that are equal, one is idle
        n = layout.size
        lower, upper = clear[..., -2 * n : -n], clear[..., -n:]
        either = torch.maximum(lower, upper)
        bounds = torch.where(fixed, either, lower), torch.where(fixed, either, upper)
        clear = torch.cat([clear[..., : -2 * n], *bounds], -1)
    return clear[..., layout.equalities :].amin(-1)


def _fixed(program: QuadraticProgram) -> Tensor | None:
    """Which variables have two equal bounds; None if there are not two."""
    if "lb" not in program.tensors or "ub" not in program.tensors:
        return None
    return program.tensors["lb"] == program.tensors["ub"]


def _snapped(z: Tensor, active: Tensor, n: int, equalities: int) -> Tensor:
    """Multipliers of zero where a constraint is not active, and none below zero."""
    multipliers = torch.where(active, z[..., n:], torch.zeros_like(z[..., n:]))
    multipliers = torch.cat([multipliers[..., :equalities], multipliers[..., equalities:].clamp(min=0)], -1)
    return torch.cat([z[..., :n] + 0.0, multipliers], -1)  # without -0


@final
class _Search:
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
        z = torch.where(proved.unsqueeze(-1), step.z, _snapped(self.given, self.active, n, equalities))
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
            ambiguous = ambiguous | (exempt & (self.margin <= _WEAK))
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
    judged = _judge(program, z, active)
    again = found.singular.reshape(judged.proved.shape) & ~judged.proved
    if bool(again.any()):  # multipliers are not unique: look near those of the solver
        start = torch.cat(
            [given[..., :n], torch.where(active, given[..., n:], torch.zeros_like(given[..., n:]))], -1
        )
        left = program.right_hand_side(given) - _applied(program, start)
        moved = start + factors.solve(left.reshape(shape)).w.reshape(given.shape)
        other = _judge(program, moved, active)
        better = (again & other.proved).unsqueeze(-1)
        z = torch.where(better, moved, z)
        judged = _Judged(*(torch.where(better if a.ndim == z.ndim else better.squeeze(-1), b, a)
                           for a, b in zip(judged, other, strict=True)))  # fmt: skip
    wrong = judged.violation > _SIGN
    next_active = active ^ wrong
    worst = torch.zeros_like(active)
    if active.shape[-1]:
        worst.scatter_(-1, judged.violation.argmax(-1, keepdim=True), value=True)
    return _Step(
        _snapped(z, active, n, equalities),
        judged.proved,
        (judged.margin <= _WEAK) | found.loose.reshape(judged.proved.shape),
        next_active,
        active ^ (worst & wrong),
    )


@final
class _Judged(NamedTuple):
    """Whether z proves its active set; by how much each constraint is violated, and the least margin."""

    proved: Tensor
    violation: Tensor
    margin: Tensor


def _judge(program: QuadraticProgram, z: Tensor, active: Tensor) -> _Judged:
    equalities = program.layout.equalities
    state = measure(program, z)
    violation = -torch.where(active, state.weight, state.slack)
    violation[..., :equalities] = 0
    proved = (_error(state, active) <= 1e-8) & (violation <= _SIGN).all(-1)
    return _Judged(proved, torch.nan_to_num(violation, nan=0.0), _margin(program, state))


def _applied(program: QuadraticProgram, z: Tensor) -> Tensor:
    """K z."""
    x, multipliers = program.split(z)
    reaction = program.reaction(multipliers)
    top = program.curvature(x)
    return torch.cat([top if reaction is None else top + reaction, program.constraints(x)], -1)


@torch.no_grad()
def describe_active_set(layout: QuadraticLayout, theta: Sequence[Tensor], z: Tensor) -> ConstraintInfo:
    """Which constraints are active at z, which only weakly, and whether they are independent."""
    program = layout.program([tensor.detach() for tensor in theta])
    state, multipliers = measure(program, z), z[..., layout.size :]
    equality = torch.arange(multipliers.shape[-1], device=z.device) < layout.equalities
    active = (multipliers > 0) | equality
    weak = torch.maximum(state.slack, state.weight) <= _WEAK
    fixed = _fixed(program)
    if fixed is not None:
        weak[..., -2 * layout.size :] &= ~torch.cat([fixed, fixed], -1)
    finite = z.isfinite().all(-1)
    return ConstraintInfo(active, weak & ~equality, finite & _independent(program, active, ~finite))


def _independent(program: QuadraticProgram, active: Tensor, exempt: Tensor) -> Tensor:
    """Whether the active rows have full rank: whether [I, Cᵀ; C, 0] has an inverse."""
    n = program.layout.size
    index = torch.arange(n, device=active.device)
    forms = {**program.layout.forms, "P": SparseForm(n, n, index, index)}
    if all(isinstance(form, DenseForm) for form in program.layout.forms.values()):
        forms["P"] = DenseForm(n, n)
    layout = replace(program.layout, names=tuple(dict.fromkeys(("P", *program.layout.names))), forms=forms)
    like = program.tensors["q"]
    one = (
        torch.eye(n, dtype=like.dtype, device=like.device) if forms["P"].event_dims == 2 else like.new_ones(n)
    )
    tensors = {**program.tensors, "P": one}
    factors = make_saddle_point(replace(program, layout=layout, tensors=tensors), active, exempt)
    count = active.shape[:-1].numel()
    steps = torch.arange(n + active.shape[-1], dtype=like.dtype, device=like.device)
    return ~factors.solve(torch.sin(1.0 + steps).expand(1, count, -1)).singular.reshape(active.shape[:-1])
