"""Phantom gradients: derivatives through damped steps attached at the solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.first_order import first_order_only
from invlayer_core.adjoints.through_steps import through_steps
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.structured import StructuredConditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.linearize import linearize

__all__ = ["Phantom"]

_PRODUCTS = 8  # with the Hessian, for a look at how large it is


@final
@dataclass(frozen=True)
class Phantom(Adjoint):
    """An approximate derivative at the price of a few evaluations: that of damped steps from y*.

    For a fixed point y ← (1 − λ) y + λ T(y, θ), and for a minimum y ← y − (λ/L) ∇f(y, θ), ``steps`` times,
    with y* as a constant; L is about the largest curvature of f in each sample, so that the units of f and y
    do not matter. That is the Neumann series of the exact derivative, cut off: with M = I − λ (I − ∂T/∂y) it
    gives λ (I + M + … + Mᵏ⁻¹) ∂T/∂θ instead of (I − ∂T/∂y)⁻¹ ∂T/∂θ. One step may be off by half and more; it
    keeps the direction of descent where M contracts, as it does at a minimum for λ ≤ 1. No linear system is
    solved, so that none can be singular. First derivatives only: a second one raises.

    Parameters
    ----------
    steps : int
        1 or more.
    damping : float
        λ: above 0; more than 1 makes little sense.

    Raises
    ------
    ConditionsError
        If a parameter is out of range; for a problem that is neither a fixed point nor a minimum.

    References
    ----------
    Geng, Zhang, Bai, Wang & Lin, On Training Implicit Models (2021), equations 8 and 9.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> a = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    >>> T = lambda y, a: 0.5 * y + a
    >>> for steps in (1, 2, 30):
    ...     adjoint = inv.adjoints.Phantom(steps)
    ...     y = inv.fixed_point(T, torch.zeros(1, dtype=torch.float64), a, adjoint=adjoint)
    ...     print(round(torch.autograd.grad(y, a)[0].item(), 6))
    1.0
    1.5
    2.0
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConditionsError(f"Phantom(steps={self.steps!r}): accepted is a number of steps, 1 or more.")
        if not self.damping > 0:
            raise ConditionsError(f"Phantom(damping={self.damping!r}): accepted is a number above 0.")

    def attach(self, solved: Solved) -> Tensor:
        system, along = solved.system, self._direction(solved.system)

        def steps(point: Tensor, theta: Sequence[Tensor]) -> Tensor:
            length: float | Tensor = along * self.damping
            if along < 0:
                length = length / _largest_curvature(system, point, theta)
            theta = first_order_only(theta, repr(self))
            for _ in range(self.steps):
                point = point + length * system.residual(point, theta).reshape(point.shape)
            return point

        return through_steps(steps, solved, solved.y.detach())

    def _direction(self, system: System) -> int:
        """Whether steps go along the residual, towards T(y), or against it, which is ∇f."""
        conditions = system.function
        if isinstance(conditions, StructuredConditions):
            conditions = conditions.conditions
        if isinstance(conditions, FixedPointConditions):
            return 1
        if "objective" in getattr(conditions, "parts", {}):
            return -1
        raise ConditionsError(
            f"adjoint={self!r} needs a step that leads to the solution, and the conditions "
            f"{getattr(system.function, '__qualname__', type(system.function).__name__)!r} do not say which. "
            "Accepted are fixed_point, minimize and least_squares; for any other problem take "
            "adjoint=Implicit()."
        )

    def describe(self, *_: object) -> str:
        return f"none: derivatives go through {self.steps} damped steps from y*"


def _largest_curvature(system: System, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """About ‖∂F/∂y‖ of every sample, ``(*batch, 1, ...)``, by power iteration; 1 where it is 0.

    From below: from a generic vector, after k products, it is short by a factor n^(1/2k) at worst. Up to 2 a
    step of 1/L contracts: for 65000 unknowns whatever their curvatures, for more if those are not all alike.
    """
    linearization = linearize(system, y.detach(), [tensor.detach() for tensor in theta])
    shape = (*system.shape.batch, *(1 for _ in system.shape.event))
    norm = lambda vectors: system.shape.vectors(vectors).norm(dim=-1).reshape(shape)  # noqa: E731
    steps = torch.arange(1, system.shape.size + 1, dtype=y.dtype, device=y.device)
    vector = ((7.0 * steps.sqrt()).frac() - 0.5).reshape(system.shape.event).expand_as(y)
    size = norm(vector)
    for _ in range(_PRODUCTS):
        rows = linearization.rows((vector / size).reshape(1, *linearization.value.shape))
        vector = rows[0].detach()
        size = torch.where(norm(vector) > 0, norm(vector), 1.0)
    return size
