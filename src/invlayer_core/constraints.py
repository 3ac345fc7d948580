"""What holds of the constraints at a solution: which are active, which only just, are they independent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.kkt import KKTConditions, multiplier_scale
from invlayer_core.conditions.system import System
from invlayer_core.conditions.two_sided import two_sided_complementarity, two_sided_weights
from invlayer_core.errors import DegeneracyWarning, warn_user
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.structure import Arguments, SystemShape

__all__ = [
    "ConstraintInfo",
    "ConstraintsAt",
    "two_sided_complementarity",
    "two_sided_weights",
    "warn_of_weakly_active",
    "weakly_active",
]

_NEAR = 1e-5  # slack and (scaled) multiplier below this: weakly active (float64; 1e-2 in float32)


@final
@dataclass(frozen=True)
class ConstraintInfo:
    """The constraints at a solution, per sample; columns are eq, ineq, lower and upper bounds, in this order.

    Attributes
    ----------
    active : Tensor of bool, shape ``(*batch, k)``
        Which constraints hold with equality and shape the derivative.
    weakly_active : Tensor of bool, shape ``(*batch, k)``
        Which inequalities hold with equality though their multiplier vanishes: y has one-sided derivatives.
    independent : Tensor of bool, shape ``(*batch,)``
        Whether the gradients of the active constraints are linearly independent (LICQ). If not, multipliers
        are not unique, and those given are of least norm.
    """

    active: Tensor
    weakly_active: Tensor
    independent: Tensor


@final
class _Activity(NamedTuple):
    """Which constraints are active, and only weakly so."""

    active: Tensor
    weak: Tensor


@final
@dataclass(frozen=True)
class ConstraintsAt:
    """The constraints of a problem at a solution z; measured once, and only if it is asked for.

    Attributes
    ----------
    conditions : KKTConditions
    z : Tensor
        With its multipliers, and on the graph if a derivative may be taken.
    arguments : Arguments
    """

    conditions: KKTConditions
    z: Tensor
    arguments: Arguments

    def warn_of_degeneracy(self) -> None:
        """Warn where a derivative will be one-sided; nothing is looked at where none can be taken."""
        layout = self.conditions.layout
        if not self.z.requires_grad or layout.constraints == layout.equalities or _functorch.is_active():
            return
        sizes = {
            "eq": layout.equalities,
            "ineq": layout.inequalities,
            "lower": layout.lower,
            "upper": layout.upper,
        }
        warn_of_weakly_active(self._activity.weak, sizes, " info.constraints tells where.")

    def describe(self) -> ConstraintInfo:
        """Active set, weak activity and independence, from one Jacobian."""
        layout, (active, weak) = self.conditions.layout, self._activity
        z = self._plain_z.detach()
        system = System(self.conditions.rows, self._plain_arguments, SystemShape.of(z, 1))
        blocks = per_sample_blocks(linearize(system, z, system.theta)).detach()
        gradients = blocks[:, layout.unknowns :, : layout.unknowns].reshape(*active.shape, layout.unknowns)
        return ConstraintInfo(active, weak, _independent(gradients, active))

    @cached_property
    def _plain_z(self) -> Tensor:
        return _functorch.plain(self.z)

    @cached_property
    def _plain_arguments(self) -> Arguments:
        tensors = [_functorch.plain(tensor) for tensor in self.arguments.tensors]
        return Arguments.flatten(self.arguments.unflatten(tensors))

    @cached_property
    def _activity(self) -> _Activity:
        program, layout = self.conditions.program, self.conditions.layout
        args = self._plain_arguments.unflatten(self._plain_arguments.tensors)
        y, multipliers = layout.split(self._plain_z)
        with torch.no_grad():
            slack = torch.cat(program.constraints(y, *args), -1)
            scaled = torch.cat(multipliers, -1) / multiplier_scale(multipliers)
        active, weak = slack < scaled, weakly_active(slack, scaled)
        equations = torch.zeros_like(active)
        equations[..., : layout.equalities] = True
        fixed = program.fixed(*args)
        if fixed is not None:  # the lower bound stands for both
            both = fixed.expand_as(y)
            equations[..., -layout.lower - layout.upper : -layout.upper] = both
            weak[..., -layout.upper :] &= ~both
            active[..., -layout.upper :] &= ~both
        return _Activity(active | equations, weak & ~equations)


def weakly_active(slack: Tensor, scaled: Tensor) -> Tensor:
    """Where slack and scaled multiplier both vanish: the constraint only just holds with equality."""
    near = _NEAR if slack.dtype == torch.float64 else 1e-2
    return (slack.abs() <= near) & (scaled.abs() <= near)


def warn_of_weakly_active(weak: Tensor, sizes: Mapping[str, int], more: str = "") -> None:
    """Warn if any constraint is, naming the first.

    Parameters
    ----------
    weak : Tensor of bool, shape ``(*batch, k)``
    sizes : mapping
        The sorts of constraints in the order of the columns, and how many there are of each.
    more : str
        What else to say.
    """
    if not bool(weak.any()):
        return
    weak = weak.reshape(-1, weak.shape[-1])
    sample, constraint = weak.nonzero()[0].tolist()
    warn_user(
        f"{int(weak.any(-1).sum())} of {weak.shape[0]} samples have a weakly active constraint (sample "
        f"{sample}: {_named(sizes, constraint)}): it holds with equality, but its multiplier vanishes, "
        "so that y has only one-sided derivatives there. The derivative is that without the constraint, or "
        f"with it, as rounding decides; activity='soft' takes one in between.{more}",
        DegeneracyWarning,
    )


def _named(sizes: Mapping[str, int], column: int) -> str:
    for name, size in sizes.items():
        if column < size:
            return f"{name}[{column}]"
        column -= size
    raise AssertionError("a column beyond the constraints")


def _independent(gradients: Tensor, active: Tensor) -> Tensor:
    """Whether the active rows have full rank, each sample by itself."""
    rows = torch.where(active.unsqueeze(-1), torch.nan_to_num(gradients), 0.0)
    lengths = rows.norm(dim=-1, keepdim=True)
    values = torch.linalg.svdvals(rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths)))
    rank = (values > torch.finfo(rows.dtype).eps ** 0.5).sum(-1)
    return rank == active.sum(-1)
