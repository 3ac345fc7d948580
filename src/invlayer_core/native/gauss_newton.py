"""``torch.gauss_newton``: Gauss–Newton for a whole batch, with a line search per sample."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from invlayer_core.native.least_squares import LeastSquares, Options, State
from invlayer_core.native.normal_equations import Gram, solve_normal

__all__ = ["GaussNewton"]


@final
class GaussNewton(LeastSquares):
    """Batched Gauss–Newton on the normal equations; a step that raises the cost is cut to a quarter.

    ``options=`` are ``maxiter``, ``xtol``, ``safeguard`` and ``check_every``.

    References
    ----------
    Nocedal & Wright, Numerical Optimization (2006), section 10.3.
    """

    name: ClassVar[str] = "torch.gauss_newton"

    def first_control(self, y: Tensor, gram: Gram, options: Options) -> Tensor:
        return torch.ones_like(y[:, 0])

    def next_control(
        self, state: State, cost: Tensor, accepted: Tensor, all_accepted: bool, options: Options
    ) -> Tensor:
        if all_accepted:
            return torch.ones_like(cost)
        return torch.where(accepted, 1.0, 0.25 * state.control)

    def model_step(
        self, gram: Gram, slope: Tensor, control: Tensor, all_accepted: bool, options: Options
    ) -> Tensor:
        step = solve_normal(gram, slope)
        return step if all_accepted else control.unsqueeze(-1) * step
