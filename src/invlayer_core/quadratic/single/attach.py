"""What one program's solution is as a function of its arguments: the attach station."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.active_set import ActiveSet
from invlayer_core.adjoints.adjoint import Solved
from invlayer_core.conditions.quadratic import MATRICES, QuadraticConditions, QuadraticLayout
from invlayer_core.conditions.system import System
from invlayer_core.matrices import SparseForm
from invlayer_core.quadratic.single.factors import factorise
from invlayer_core.quadratic.single.program import HostProgram
from invlayer_core.quadratic.single.solve import CertifiedPoint, certified, solved
from invlayer_core.solvers.contract import Solver
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["solve_single"]


def solve_single(
    layout: QuadraticLayout,
    theta: Sequence[Tensor],
    solver: Solver,
    options: Mapping[str, Any],
    *,
    multipliers: bool = False,
) -> tuple[Tensor, ...] | None:
    """x, and the four multipliers if asked for, differentiable; None if it is not as plain as that."""
    program = HostProgram.of(layout, theta)
    if program is None:
        return None
    z = solved(program, solver, np.zeros(layout.size), options)
    found = None if z is None else certified(program, np.asarray(z))
    if found is None:
        return None
    whole = torch.from_numpy(found.z)
    parts = whole.split(layout.sections) if multipliers else (whole[: layout.size],)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in theta):
        return tuple(parts)
    rule = _Rule(layout, program, found, multipliers)
    attached: tuple[Tensor, ...] = _functorch.apply(_SingleProgram, rule, tuple(parts), *theta)
    return attached


@final
class _Rule:
    """What the backward pass needs; its factors serve all cotangents."""

    def __init__(
        self, layout: QuadraticLayout, program: HostProgram, found: CertifiedPoint, multipliers: bool
    ) -> None:
        self.layout, self.program, self.found, self.multipliers = layout, program, found, multipliers
        self.factors = found.factors

    def pull(self, cotangents: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None] | None:
        """θ̄; None if the linear system does not hold."""
        if self.factors is None:
            self.factors = factorise(self.program, self.found.active)
        rhs = np.zeros(len(self.found.z))
        rhs[: self.layout.size] = cotangents[0].numpy()
        if self.multipliers:
            rhs[self.layout.size :] = np.concatenate([bar.numpy() for bar in cotangents[1:]])
            rhs[self.layout.size :][~self.found.active] = 0.0
        w = None if self.factors is None else self.factors.solve(rhs)
        if w is None:
            return None
        both = np.stack([w, self.found.z])
        right = -both[::-1, : self.layout.size]  # every matrix bar is −(w zᵀ + z wᵀ), of its part of both
        return [
            torch.from_numpy(self._bar(name, both, right)) if want else None
            for name, want in zip(self.layout.names, wanted, strict=True)
        ]

    def _bar(self, name: str, both: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The cotangent of one argument."""
        layout = self.layout
        if name == "q":
            return right[1].copy()
        first, last = _places(layout)[_ROWS_OF.get(name, name)]
        if name not in MATRICES:
            return both[0, first:last] * (-1.0 if name == "lb" else 1.0)
        form, left = layout.forms[name], both[:, first:last]
        if isinstance(form, SparseForm):
            row, column = form.row.numpy(), form.column.numpy()
            bar = left[0][row] * right[0][column] + left[1][row] * right[1][column]
        else:
            bar = left.T @ right
        return 0.5 * bar if name == "P" else bar


_ROWS_OF = {"h": "G", "b": "A"}


def _places(layout: QuadraticLayout) -> dict[str, tuple[int, int]]:
    """Where in z what belongs to an argument stands."""
    ends = list(accumulate(layout.sections))
    return dict(zip(("P", "A", "G", "lb", "ub"), pairwise([0, *ends]), strict=True))


@final
@_functorch.with_cached_signature
class _SingleProgram(torch.autograd.Function):
    """The parts of z, as functions of θ."""

    @staticmethod
    def forward(rule: _Rule, parts: tuple[Tensor, ...], *theta: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in parts)  # the caller may write into them

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rule, _, *theta = inputs
        ctx.save_for_backward(*theta)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        theta, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        mapped = any(_functorch.is_mapped_by_autograd(bar) for bar in cotangents)
        plain = not torch.is_grad_enabled() and not mapped
        bars = ctx.rule.pull(cotangents, wanted) if plain else None
        return None, None, *(_general(ctx.rule, theta, cotangents, wanted) if bars is None else bars)


def _general(
    rule: _Rule, theta: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same by the general way, differentiable."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        moving = [tensor if want else tensor.detach() for tensor, want in zip(theta, wanted, strict=True)]
        z = torch.from_numpy(rule.found.z)
        shape = SystemShape(z.shape[:0], z.shape)
        system = System(QuadraticConditions(rule.layout), Arguments.flatten(tuple(moving)), shape)
        parts = ActiveSet().attach(Solved(system, z)).split(rule.layout.sections)
        grads = torch.autograd.grad(
            parts[: len(cotangents)],
            [tensor for tensor, want in zip(moving, wanted, strict=True) if want],
            cotangents,
            create_graph=recorded,
            materialize_grads=True,
        )
    supply = iter(grads)
    return [next(supply) if want else None for want in wanted]
