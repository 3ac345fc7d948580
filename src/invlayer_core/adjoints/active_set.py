"""The implicit adjoint of quadratic programs, on the constraints that are active.

Where every constraint is either strictly active or strictly inactive, the active ones stay the same nearby,
and z = (x, μ) solves a linear system with a symmetric matrix (see ``linear/saddle_point/``):

    K(P, A, G) z = r(q, b, h, lb, ub)

Hence every derivative of a quadratic program is one of a linear solve, r̄ = w and K̄ = −w zᵀ with K w = z̄,
whose own derivative is of the same form (Amos & Kolter, OptNet, ICML 2017, equations 6 to 8, without their
division by multipliers). z is known already from the solver: nothing is factorised before it is
differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.saddle_derivatives import recorded_saddle_point
from invlayer_core.adjoints.saddle_point import SaddlePoint, SaddleRule
from invlayer_core.conditions.quadratic import MATRICES, QuadraticConditions, QuadraticLayout
from invlayer_core.errors import UnsupportedTransformError
from invlayer_core.linear.saddle_point.bank import SaddleBank
from invlayer_core.structure import SystemShape

__all__ = ["ActiveSet"]


@final
@dataclass(frozen=True)
class ActiveSet(Adjoint):
    """Exact derivatives of every order of a quadratic program, on its active set.

    Attributes
    ----------
    settings : Implicit
        What a sample gives whose system is singular: the fields ``singular`` and ``damping``.
    bank : SaddleBank
        Factors that the forward may have left.
    """

    settings: Implicit = field(default_factory=lambda: Implicit(singular="consistent"))
    bank: SaddleBank = field(default_factory=SaddleBank)

    def attach(self, solved: Solved) -> Tensor:
        system, y, dead = solved.system, solved.y, solved.dead
        assert isinstance(system.function, QuadraticConditions)
        layout = system.function.layout
        program = layout.program(system.theta)
        rhs = program.right_hand_side(y)
        active = active_constraints(layout, y)
        matrices = [program.tensors.get(name) for name in MATRICES]
        if _functorch.forward_mode_depth() >= 2:
            if dead is not None:
                raise UnsupportedTransformError(_NESTED_WITH_FAILURES)
            return recorded_saddle_point(layout, y, active, dead, matrices, rhs, solved.dead_value)
        bank = SaddleBank() if _functorch.is_active() else self.bank
        if bank.active is not None and torch.equal(bank.active, active):
            active = bank.active  # the very one that the factors in the bank were made for
        rule = SaddleRule(layout, self.settings, solved.dead_value, bank)
        result: Tensor = _functorch.apply(SaddlePoint, rule, y, active, dead, *matrices, rhs)
        return result

    def describe(self, shape: SystemShape, dtype: torch.dtype) -> str:
        return "active set: Schur complement by Cholesky, minimum norm where singular"


_NESTED_WITH_FAILURES = (
    "nested forward mode (jacfwd of jacfwd) over a batch of quadratic programs with failed samples is not "
    "defined; accepted is on_failure='raise', or reverse mode on the outside (jacfwd of jacrev)."
)


def active_constraints(layout: QuadraticLayout, z: Tensor) -> Tensor:
    """Rows of A, and what has a positive multiplier: the forward leaves zero for the others."""
    multipliers = z.detach()[..., layout.size :]
    equality = torch.arange(multipliers.shape[-1], device=z.device) < layout.equalities
    return (multipliers > 0) | equality
