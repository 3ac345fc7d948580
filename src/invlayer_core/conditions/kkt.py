"""Constrained minimisation: the Karush–Kuhn–Tucker conditions as a square system F(z) = 0.

    min f(y)   such that   h(y) = 0,   c(y) ≥ 0,   lower ≤ y ≤ upper

With multipliers λ for h, μ ≥ 0 for c and ζ, ξ ≥ 0 for the bounds, z = (y, λ, μ, ζ, ξ) and

    F(z) = [ ∇f − ∂hᵀλ − ∂cᵀμ − ζ + ξ ;  h ;  min(c, μ) ;  min(y − lower, ζ) ;  min(upper − y, ξ) ].

A row min(c, μ) is zero exactly where c ≥ 0, μ ≥ 0 and cμ = 0 hold. Its derivative is dc where c < μ and dμ
elsewhere: the primal–dual test of the active set (Facchinei & Pang 2003, section 9.1; Hintermüller, Ito &
Kunisch 2002). So the same F certifies a solution, polishes it (a Newton step on F is one step of the
primal–dual active-set method), and gives its derivative, that of the reduced KKT system of sensitivity
analysis (Fiacco 1976).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.stationarity import gradient_with_aux
from invlayer_core.errors import ConditionsError

__all__ = [
    "Activity",
    "ConstraintLayout",
    "KKTConditions",
    "Multipliers",
    "Program",
    "complementarity",
    "multiplier_scale",
]

Activity = Literal["exact", "soft", "full"]


@final
class Multipliers(NamedTuple):
    """The multipliers of a constrained minimum, each ``(*batch, k)``; k = 0 if there is no such constraint.

    Signs: ∇f = ∂hᵀ equalities + ∂cᵀ inequalities + lower − upper, with all but the first not negative. For a
    quadratic program, whose inequalities are G x ≤ h, and as its solvers have it:
    P x + q + Aᵀ equalities + Gᵀ inequalities − lower + upper = 0.
    """

    equalities: Tensor
    inequalities: Tensor
    lower: Tensor
    upper: Tensor


@final
@dataclass(frozen=True)
class ConstraintLayout:
    """How many unknowns, and multipliers of each sort, make up z."""

    unknowns: int
    equalities: int
    inequalities: int
    lower: int  # n, or 0 without such bounds
    upper: int

    @property
    def constraints(self) -> int:
        """How many multipliers there are."""
        return self.equalities + self.inequalities + self.lower + self.upper

    @property
    def size(self) -> int:
        """The length of z."""
        return self.unknowns + self.constraints

    def split(self, z: Tensor) -> tuple[Tensor, Multipliers]:
        """z ``(*batch, size)`` as y and its multipliers."""
        y, *multipliers = z.split(
            [self.unknowns, self.equalities, self.inequalities, self.lower, self.upper], -1
        )
        return y, Multipliers(*multipliers)


@final
@dataclass(frozen=True)
class Program:
    """The functions of a constrained problem; each takes ``(y, *args, lower, upper)``.

    Attributes
    ----------
    objective : callable
        ``-> (*batch,)``.
    equalities, inequalities : callable or None
        ``-> (*batch, k)``.
    lower, upper : bool
        Whether there are such bounds; the last two of the args are then tensors, and None otherwise.
    """

    objective: Callable[..., Tensor]
    equalities: Callable[..., Tensor] | None
    inequalities: Callable[..., Tensor] | None
    lower: bool
    upper: bool

    @property
    def functions(self) -> tuple[Callable[..., Tensor], ...]:
        """The user's own functions."""
        functions = (self.objective, self.equalities, self.inequalities)
        return tuple(function for function in functions if function is not None)

    @property
    def parts(self) -> Mapping[str, Callable[..., Tensor]]:
        """What a solver may ask for, by name; all as functions of ``(y, *args, lower, upper)``."""
        parts: dict[str, Callable[..., Tensor]] = {"objective": _Inner(self.objective)}
        for name in ("equalities", "inequalities"):
            if getattr(self, name) is not None:
                parts[name] = _Inner(getattr(self, name), event=True)
        if self.lower:
            parts["lower"] = _lower
        if self.upper:
            parts["upper"] = _upper
        return parts

    def fixed(self, *args: Any) -> Tensor | None:
        """Which unknowns have lower = upper, where there are both bounds; broadcasts to y."""
        return args[-2] == args[-1] if self.lower and self.upper else None

    def constraints(self, y: Tensor, *args: Any) -> list[Tensor]:
        """h, c, y − lower and upper − y, each ``(*batch, k)``; empty ones where there are none."""
        none = y[..., :0]
        functions = [self.equalities, self.inequalities]
        values = [none if f is None else _Inner(f, event=True)(y, *args) for f in functions]
        values.append(y - args[-2] if self.lower else none)
        values.append(args[-1] - y if self.upper else none)
        return values


def _lower(y: Tensor, *args: Any) -> Tensor:
    bound: Tensor = args[-2].expand_as(y)
    return bound


def _upper(y: Tensor, *args: Any) -> Tensor:
    bound: Tensor = args[-1].expand_as(y)
    return bound


@final
@dataclass(frozen=True)
class _Inner:
    """The user's ``function(y, *args)``, given the bounds besides."""

    function: Callable[..., Tensor]
    event: bool = False  # whether it returns a vector per sample

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        value = self.function(y, *args[:-2])
        if not self.event:
            return value
        batch = y.shape[:-1]
        if not isinstance(value, Tensor) or value.ndim <= len(batch) or value.shape[: len(batch)] != batch:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            raise ConditionsError(
                f"constraint {name!r} returned {came} for y of shape {tuple(y.shape)}; accepted is "
                f"{(*batch, 'k')}: one system's constraints behind the batch dims. Keep the last dim of a "
                "single constraint: y[..., :1], or unsqueeze(-1)."
            )
        return value.flatten(len(batch))


@final
@dataclass(frozen=True)
class KKTConditions:
    """``F(z, *args, lower, upper)``, zero at a constrained minimum with its multipliers.

    Attributes
    ----------
    program : Program
    layout : ConstraintLayout
    activity : {"exact", "soft", "full"}
        How an inequality enters; see :func:`complementarity`.
    """

    program: Program
    layout: ConstraintLayout
    activity: Activity = "exact"

    @property
    def function(self) -> Callable[..., Tensor]:
        """The user's objective, for messages."""
        return getattr(self.program.objective, "function", self.program.objective)

    @property
    def functions(self) -> tuple[Callable[..., Tensor], ...]:
        """All of the user's functions, for what they capture."""
        return self.program.functions

    def __call__(self, z: Tensor, *args: Any) -> Tensor:
        stationarity, slacks, multipliers = self._evaluate(z, *args)
        equal, inequal, below, above = slacks
        scale = 1.0 / multiplier_scale(multipliers)
        rows = [complementarity(inequal, multipliers.inequalities, scale, self.activity)]
        lower = complementarity(below, multipliers.lower, scale, self.activity)
        upper = complementarity(above, multipliers.upper, scale, self.activity)
        if (fixed := self.program.fixed(*args)) is not None:  # an equation, and not two
            fixed = fixed.expand_as(below)
            lower = torch.where(fixed, below, lower)
            upper = torch.where(fixed, multipliers.upper, upper)
        return torch.cat([stationarity, equal, *rows, lower, upper], -1)

    def rows(self, z: Tensor, *args: Any) -> Tensor:
        """The gradient of the Lagrangian, and the constraints themselves: all that F is made of."""
        stationarity, slacks, _ = self._evaluate(z, *args)
        return torch.cat([stationarity, *slacks], -1)

    def _evaluate(self, z: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], Multipliers]:
        y, multipliers = self.layout.split(z)

        def lagrangian(point: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
            slacks = self.program.constraints(point, *args)
            value = _Inner(self.program.objective)(point, *args)
            for slack, multiplier in zip(slacks, multipliers, strict=True):
                if multiplier.shape[-1]:  # a bound that is not there has no multiplier, and ∞ · 0 is NaN
                    product = torch.where(slack.isfinite() | slack.isnan(), slack, 0.0) * multiplier
                    value = value - product.sum(-1)
            return value, slacks

        stationarity, slacks = gradient_with_aux(lagrangian, self.program.objective, y, args)
        return stationarity, slacks, multipliers


def multiplier_scale(multipliers: Multipliers) -> Tensor:
    """The largest multiplier of every sample, ``(*batch, 1)``, as a constant.

    At least 1e-6 (1e-3 in float32): where all multipliers are rounding errors, they are not to be told apart.
    """
    joined = torch.cat(multipliers, -1).detach()
    if not joined.shape[-1]:
        return joined.new_ones(*joined.shape[:-1], 1)
    return joined.abs().amax(-1, keepdim=True).clamp_min(1e-6 if joined.dtype == torch.float64 else 1e-3)


def complementarity(slack: Tensor, multiplier: Tensor, scale: Tensor, activity: Activity) -> Tensor:
    """Zero where slack ≥ 0, multiplier ≥ 0, and one of them vanishes.

    The multiplier is compared in units of the largest one (``scale``), so that the active set does not depend
    on the units of the objective.

    Parameters
    ----------
    slack, multiplier : Tensor of shape ``(*batch, k)``
    scale : Tensor of shape ``(*batch, 1)``
    activity : {"exact", "soft", "full"}
        ``"exact"``: min(slack, multiplier). ``"soft"``: the same value with the derivative of slack ·
        multiplier = const, which at the point where an interior-point method stopped is that of its barrier
        problem: θ dslack + (1 − θ) dmultiplier with θ = multiplier / (slack + multiplier). ``"full"``:
        slack · multiplier itself (Amos & Kolter 2017, equation 6), whose Jacobian is singular where both
        vanish.
    """
    scaled = multiplier * scale
    finite = slack.isfinite() | slack.isnan()
    slack = torch.where(finite, slack, torch.ones_like(slack))
    if activity == "full":
        return torch.where(finite, slack * scaled, scaled)
    exact = torch.where(finite & ~(slack >= scaled), slack, scaled)  # NaN in the slack stays
    if activity == "exact":
        return exact
    total = (slack + scaled).detach()
    known = finite & (total > 0)
    soft = torch.where(known, slack * scaled / torch.where(known, total, torch.ones_like(total)), scaled)
    return soft + (exact - soft).detach()
