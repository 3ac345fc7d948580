"""What ``info.constraints`` says of a quadratic program's solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticLayout, QuadraticProgram, measure
from invlayer_core.constraints import ConstraintInfo
from invlayer_core.linear.saddle_point.bank import make_saddle_point
from invlayer_core.matrices import DenseForm, SparseForm
from invlayer_core.quadratic.sides import WEAK, fixed_variables

__all__ = ["describe_active_set"]


@torch.no_grad()
def describe_active_set(layout: QuadraticLayout, theta: Sequence[Tensor], z: Tensor) -> ConstraintInfo:
    """Which constraints are active at z, which only weakly, and whether they are independent."""
    program = layout.program([tensor.detach() for tensor in theta])
    state, multipliers = measure(program, z), z[..., layout.size :]
    equality = torch.arange(multipliers.shape[-1], device=z.device) < layout.equalities
    active = (multipliers > 0) | equality
    weak = torch.maximum(state.slack, state.weight) <= WEAK
    fixed = fixed_variables(program)
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
