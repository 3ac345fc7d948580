"""What every adjoint is: a way to make a solution differentiable."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from invlayer_core.adjoints.unchanged import Certified
from invlayer_core.conditions.system import System
from invlayer_core.linear.factor_bank import FactorBank
from invlayer_core.solvers.iterations import Iterations
from invlayer_core.structure import SystemShape

__all__ = ["Adjoint", "Solved"]


@final
@dataclass(frozen=True, eq=False)
class Solved:
    """A system and its solution, as an adjoint gets them.

    Attributes
    ----------
    system : System
    y : Tensor of shape ``(*batch, *event)``
        The solution, without gradient.
    dead : Tensor of shape ``(*batch,)`` or None
        Samples that failed, and whose derivative is ``dead_value``.
    dead_value : float
        0 or NaN. A zero cotangent gives zero either way.
    certified : Certified or None
        F(y) as it was measured; None where there is nothing to compare with it.
    factors : FactorBank or None
        The Jacobian near y, factorised by the forward solve or the last Newton step, if it was.
    iterations : Iterations or None
        Those of the forward solver, if ``needs_iterations``.
    resolve : callable or None
        Solves another system from a guess, by the same solver, if ``needs_resolve``.
    """

    system: System
    y: Tensor
    dead: Tensor | None = None
    dead_value: float = math.nan
    certified: Certified | None = None
    factors: FactorBank | None = None
    iterations: Iterations | None = None
    resolve: Callable[[System, Tensor], Tensor] | None = None


class Adjoint(ABC):
    """The rule by which derivatives cross the solve.

    Attributes
    ----------
    needs_iterations : bool
        Whether it differentiates through iterations of the solver, which autograd then has to record.
    records_solve : bool
        Whether it is the solve itself that is to be recorded.
    chunk_size : int or None
        Most rows of a Jacobian that are taken in one pass; None leaves it to their size.
    """

    needs_iterations: ClassVar[bool] = False
    records_solve: ClassVar[bool] = False
    chunk_size: int | None = None

    @property
    def needs_resolve(self) -> bool:
        """Whether it solves other systems by the solver of the forward; False unless an adjoint says so."""
        return False

    @abstractmethod
    def attach(self, solved: Solved) -> Tensor:
        """``solved.y`` again, now a differentiable function of ``solved.system.theta``."""

    def describe(self, shape: SystemShape, dtype: torch.dtype) -> str:
        """For ``SolveInfo.linear_solver``: what solves the linear systems of the derivative, and why."""
        return ""
