"""Derivatives through recorded steps: what the adjoints have in common that differentiate iterations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.adjoint import Solved
from invlayer_core.adjoints.failed import recorded_out_of_harm
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.recorded import with_derivative_of

__all__ = ["through_steps"]


def through_steps(
    steps: Callable[[Tensor, Sequence[Tensor]], Tensor], solved: Solved, start: Tensor
) -> Tensor:
    """``solved.y`` with the derivative of ``steps(start, theta)``, to which failed samples add nothing.

    Parameters
    ----------
    steps : callable
        From a start ``(*batch, *event)`` and θ to where they lead, in torch.
    solved : Solved
    start : Tensor of shape ``(*batch, *event)``
        A constant.
    """
    dead = solved.dead
    theta: Sequence[Tensor] = solved.system.theta
    if dead is not None:
        if bool(_functorch.plain(dead).all()):
            return Implicit().attach(solved)  # nothing to differentiate
        start, theta = recorded_out_of_harm(solved.system, start, dead, theta)
    return with_derivative_of(steps(start, theta), solved.y, dead, solved.dead_value)
