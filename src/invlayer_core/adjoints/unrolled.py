"""Derivatives through the iterations of the solver: all of them, or the last k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from invlayer_core.adjoints.adjoint import Adjoint, Solved
from invlayer_core.adjoints.recorded import with_derivative_of
from invlayer_core.adjoints.through_steps import through_steps

__all__ = ["Unrolled"]


@final
@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Derivatives of every order through all iterations of the solver, as autograd records them.

    They are those of the iterate that the solver stopped at, and no more exact than that: where an iteration
    gains a factor ρ in y it gains about as much in dy/dθ, some iterations later. Memory grows with the
    number of iterations. The initial guess counts as constant.

    Needs a solver written in differentiable torch, such as ``torch.newton``.

    References
    ----------
    Griewank & Walther, Evaluating Derivatives (2008), chapter 15. Gilbert, Automatic differentiation and
    iterative processes, Optimization Methods and Software 1 (1992).

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    >>> y0 = torch.ones(1, dtype=torch.float64)
    >>> y = inv.root(lambda y, a: y**2 - a, y0, a, adjoint=inv.adjoints.Unrolled())
    >>> y.backward()
    >>> bool((a.grad - 0.5 / 2**0.5).abs() < 1e-12)
    True
    """

    needs_iterations: ClassVar[bool] = True
    records_solve: ClassVar[bool] = True

    def attach(self, solved: Solved) -> Tensor:
        iterations = solved.iterations
        assert iterations is not None
        if solved.dead is None and iterations.recorded is not None:
            return with_derivative_of(iterations.recorded, solved.y, None, solved.dead_value)
        steps = lambda start, theta: iterations.whole(solved.system, start, theta)  # noqa: E731
        return through_steps(steps, solved, iterations.start)

    def describe(self, *_: object) -> str:
        return "none: derivatives go through all iterations"
