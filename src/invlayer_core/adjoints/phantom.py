"""Phantom gradients: derivatives through damped steps attached at the solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.adjoint import Adjoint
from invlayer_core.adjoints.failed import recorded_out_of_harm
from invlayer_core.adjoints.first_order import first_order_only
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.recorded import with_derivative_of
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.structured import StructuredConditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.linear.factor_bank import FactorBank
from invlayer_core.solvers.iterations import Iterations

__all__ = ["Phantom"]


@final
@dataclass(frozen=True)
class Phantom(Adjoint):
    """An approximate derivative at the price of a few evaluations: that of damped steps from y*.

    For a fixed point y ← (1 − λ) y + λ T(y, θ), and for a minimum y ← y − λ ∇f(y, θ), ``steps`` times, with
    y* as a constant. That is the Neumann series of the exact derivative, cut off: with M = I − λ (I − ∂T/∂y)
    it gives λ (I + M + … + Mᵏ⁻¹) ∂T/∂θ instead of (I − ∂T/∂y)⁻¹ ∂T/∂θ. One step may be off by half and more;
    it keeps the direction of descent where M contracts. No linear system is solved, so that none can be
    singular. First derivatives only: a second one raises.

    Parameters
    ----------
    steps : int
        1 or more.
    damping : float
        λ: above 0; at most 1 makes sense for a fixed point.

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

    def attach(
        self,
        system: System,
        y: Tensor,
        dead: Tensor | None,
        dead_value: float,
        factors: FactorBank | None = None,
        iterations: Iterations | None = None,
        resolve: Callable[[System, Tensor], Tensor] | None = None,
    ) -> Tensor:
        length = self._step_length(system)
        if dead is not None and bool(_functorch.plain(dead).all()):
            return Implicit().attach(system, y, dead, dead_value)  # nothing to differentiate
        theta: Sequence[Tensor] = first_order_only(system.theta, repr(self))
        point = y.detach()
        if dead is not None:
            point, theta = recorded_out_of_harm(system, point, dead, theta)
        for _ in range(self.steps):
            point = point + length * system.residual(point, theta).reshape(point.shape)
        return with_derivative_of(point, y, dead, dead_value)

    def _step_length(self, system: System) -> float:
        """λ in the direction in which the residual points: towards T(y), but against ∇f."""
        conditions = system.function
        if isinstance(conditions, StructuredConditions):
            conditions = conditions.conditions
        if isinstance(conditions, FixedPointConditions):
            return self.damping
        if "objective" in getattr(conditions, "parts", {}):
            return -self.damping
        raise ConditionsError(
            f"adjoint={self!r} needs a step that leads to the solution, and the conditions "
            f"{getattr(system.function, '__qualname__', type(system.function).__name__)!r} do not say which. "
            "Accepted are fixed_point, minimize and least_squares; for any other problem take "
            "adjoint=Implicit()."
        )

    def describe(self, *_: object) -> str:
        return f"none: derivatives go through {self.steps} damped steps from y*"
