"""What holds of the constraints at a solution: which are active, which only just, are they independent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    "describe_constraints",
    "two_sided_complementarity",
    "two_sided_weights",
    "warn_of_degeneracy",
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
    """z, plain, and which of its constraints are active, and only weakly so."""

    z: Tensor
    active: Tensor
    weak: Tensor


def _activity(conditions: KKTConditions, z: Tensor, arguments: Arguments) -> _Activity:
    z, layout = _functorch.plain(z), conditions.layout
    args = arguments.unflatten([_functorch.plain(tensor) for tensor in arguments.tensors])
    y, multipliers = conditions.layout.split(z)
    with torch.no_grad():
        slack = torch.cat(conditions.program.constraints(y, *args), -1)
        scaled = torch.cat(multipliers, -1) / multiplier_scale(multipliers)
    active, weak = slack < scaled, weakly_active(slack, scaled)
    equations = torch.zeros_like(active)
    equations[..., : layout.equalities] = True
    fixed = conditions.program.fixed(*args)
    if fixed is not None:  # the lower bound stands for both
        both = fixed.expand_as(y)
        equations[..., -layout.lower - layout.upper : -layout.upper] = both
        weak[..., -layout.upper :] &= ~both
        active[..., -layout.upper :] &= ~both
    return _Activity(z, active | equations, weak & ~equations)


def warn_of_degeneracy(conditions: KKTConditions, z: Tensor, arguments: Arguments) -> None:
    """Warn where a derivative will be one-sided; nothing is looked at where none can be taken."""
    layout = conditions.layout
    if not z.requires_grad or layout.constraints == layout.equalities or _functorch.is_active():
        return
    sizes = {
        "eq": layout.equalities,
        "ineq": layout.inequalities,
        "lower": layout.lower,
        "upper": layout.upper,
    }
    weak = _activity(conditions, z, arguments).weak
    warn_of_weakly_active(weak, sizes, " info.constraints tells where.")


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


def describe_constraints(conditions: KKTConditions, z: Tensor, arguments: Arguments) -> ConstraintInfo:
    """Active set, weak activity and independence, from one Jacobian."""
    layout = conditions.layout
    z, active, weak = _activity(conditions, z, arguments)
    plain = Arguments.flatten(arguments.unflatten([_functorch.plain(t) for t in arguments.tensors]))
    system = System(conditions.rows, plain, SystemShape.of(z, 1))
    blocks = per_sample_blocks(linearize(system, z.detach(), system.theta)).detach()
    gradients = blocks[:, layout.unknowns :, : layout.unknowns].reshape(*active.shape, layout.unknowns)
    return ConstraintInfo(active, weak, _independent(gradients, active))


def _independent(gradients: Tensor, active: Tensor) -> Tensor:
    """Whether the active rows have full rank, each sample by itself."""
    rows = torch.where(active.unsqueeze(-1), torch.nan_to_num(gradients), 0.0)
    lengths = rows.norm(dim=-1, keepdim=True)
    values = torch.linalg.svdvals(rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths)))
    rank = (values > torch.finfo(rows.dtype).eps ** 0.5).sum(-1)
    return rank == active.sum(-1)
