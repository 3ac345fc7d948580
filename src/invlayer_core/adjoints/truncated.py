"""Derivatives through the last k iterations of the solver, from the solution on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.through_steps import through_steps
from invlayer_core.errors import ConditionsError

__all__ = ["Truncated"]


@final
@dataclass(frozen=True)
class Truncated(Adjoint):
    """Derivatives through ``steps`` further iterations of the solver, from y* as a constant.

    The value is y* itself. As many iterations as are recorded, so much of the derivative is there: after k
    steps of a method that gains a factor ρ each, dy/dθ is off by about ρᵏ; Newton's method has all of it
    after one. Derivatives of higher order are those of the recorded steps. Memory grows with k alone.

    Needs a solver written in differentiable torch, such as ``torch.newton``.

    Parameters
    ----------
    steps : int
        k, 1 or more.

    Raises
    ------
    ConditionsError
        If ``steps`` is not a positive integer.

    References
    ----------
    Shaban, Cheng, Hatch & Boots, Truncated Back-propagation for Bilevel Optimization (2019). Pineda et al.,
    Theseus: A Library for Differentiable Nonlinear Optimization (2022), section 3.3.

    Examples
    --------
    >>> Truncated(5).steps
    5
    """

    steps: int

    needs_iterations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConditionsError(
                f"Truncated(steps={self.steps!r}): accepted is a number of iterations, 1 or more."
            )

    def attach(self, solved: Solved) -> Tensor:
        iterations = solved.iterations
        assert iterations is not None
        steps = lambda point, theta: iterations.last(solved.system, point, theta, self.steps)  # noqa: E731
        return through_steps(steps, solved, solved.y.detach())

    def describe(self, *_: object) -> str:
        return f"none: derivatives go through {self.steps} iterations from y*"
