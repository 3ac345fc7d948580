"""On which side of each constraint a point stands: how clearly, and with what error."""

from __future__ import annotations

from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import Measured, QuadraticProgram, measure

__all__ = [
    "CLEAR",
    "EXACT",
    "SIGN",
    "WEAK",
    "Judged",
    "fixed_variables",
    "judge",
    "largest_error",
    "least_margin",
    "looks_active",
    "snapped",
]

EXACT: Final = 1e-11  # relative error of a solution that needs no polish
CLEAR: Final = 1e-7  # margin of a constraint whose side is beyond doubt at that error
WEAK: Final = 1e-9  # margin of a constraint, after polishing, that counts as weakly active
SIGN: Final = 1e-11  # a violation, relative, that rounding may have made


def looks_active(state: Measured, equalities: int, told: Tensor | None) -> Tensor:
    """Which constraints look active: by slack and multiplier, where the solver has told that."""
    active = state.weight > state.slack
    if told is not None:  # by the slack alone
        active = torch.where(told, active, state.slack <= 1e-5)
    active[..., :equalities] = True
    return active


def largest_error(state: Measured, active: Tensor) -> Tensor:
    """The largest relative violation of the conditions, ``(*batch,)``."""
    error = state.stationarity.abs().amax(-1)
    if not active.shape[-1]:
        return error
    return torch.maximum(error, torch.where(active, state.slack, state.weight).abs().amax(-1))


def least_margin(program: QuadraticProgram, state: Measured) -> Tensor:
    """How clearly the least clear inequality is active or not, ``(*batch,)``."""
    layout, clear = program.layout, torch.maximum(state.slack, state.weight)
    if clear.shape[-1] == layout.equalities:
        return torch.full_like(state.stationarity[..., 0], torch.inf)
    fixed = fixed_variables(program)
    if fixed is not None:  # of two bounds that are equal, one is idle
        n = layout.size
        lower, upper = clear[..., -2 * n : -n], clear[..., -n:]
        either = torch.maximum(lower, upper)
        bounds = torch.where(fixed, either, lower), torch.where(fixed, either, upper)
        clear = torch.cat([clear[..., : -2 * n], *bounds], -1)
    return clear[..., layout.equalities :].amin(-1)


def fixed_variables(program: QuadraticProgram) -> Tensor | None:
    """Which variables have two equal bounds; None if there are not two."""
    if "lb" not in program.tensors or "ub" not in program.tensors:
        return None
    return program.tensors["lb"] == program.tensors["ub"]


def snapped(z: Tensor, active: Tensor, n: int, equalities: int) -> Tensor:
    """Multipliers of zero where a constraint is not active, and none below zero."""
    multipliers = torch.where(active, z[..., n:], torch.zeros_like(z[..., n:]))
    multipliers = torch.cat([multipliers[..., :equalities], multipliers[..., equalities:].clamp(min=0)], -1)
    return torch.cat([z[..., :n] + 0.0, multipliers], -1)  # without -0


@final
class Judged(NamedTuple):
    """Whether z proves its active set; by how much each constraint is violated, and the least margin."""

    proved: Tensor
    violation: Tensor
    margin: Tensor


def judge(program: QuadraticProgram, z: Tensor, active: Tensor) -> Judged:
    """What a solution on an active set says about that set."""
    equalities = program.layout.equalities
    state = measure(program, z)
    violation = -torch.where(active, state.weight, state.slack)
    violation[..., :equalities] = 0
    proved = (largest_error(state, active) <= 1e-8) & (violation <= SIGN).all(-1)
    return Judged(proved, torch.nan_to_num(violation, nan=0.0), least_margin(program, state))
