"""``torch.levenberg_marquardt``: Levenberg–Marquardt for a whole batch, each sample with its own damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from invlayer_core.native import iterative, least_squares
from invlayer_core.native.least_squares import LeastSquares, State
from invlayer_core.native.normal_equations import Gram, promised, solve_normal

__all__ = ["LevenbergMarquardt"]

_LEAST = 1e-14
_MOST = 1e14


@final
@dataclass(frozen=True)
class _Options(least_squares.Options):
    """``options=`` of ``torch.levenberg_marquardt``.

    Those of all least-squares solvers, and damping : λ at the start, relative to the diagonal of JᵀJ. Without
    ``safeguard`` it stays as it is.
    """

    damping: float = 1e-3


@final
class LevenbergMarquardt(LeastSquares):
    """(JᵀJ + λ diag JᵀJ) d = Jᵀr, where λ follows the gain: the actual over the promised change of the cost.

    An iteration that counts on λ is not differentiated through it: λ is a constant for ``Unrolled``.

    References
    ----------
    Marquardt, An algorithm for least-squares estimation of nonlinear parameters, J. SIAM 11 (1963). Nielsen,
    Damping parameter in Marquardt's method, IMM-REP-1999-05.
    """

    name: ClassVar[str] = "torch.levenberg_marquardt"
    Options: ClassVar[type[iterative.Options]] = _Options

    def first_control(self, y: Tensor, gram: Gram, options: _Options) -> Tensor:
        return torch.full_like(y[:, 0], options.damping)

    def next_control(
        self, state: State, cost: Tensor, accepted: Tensor, all_accepted: bool, options: _Options
    ) -> Tensor:
        if not options.safeguard:
            return state.control
        gain = (state.cost - cost) / promised(state.gram, state.slope, state.step)
        factor = (1 - (2 * torch.nan_to_num(gain) - 1) ** 3).clamp(0.1, 2.0)
        return (state.control * torch.where(accepted, factor, 4.0)).clamp(_LEAST, _MOST)

    def model_step(
        self, gram: Gram, slope: Tensor, control: Tensor, all_accepted: bool, options: _Options
    ) -> Tensor:
        return solve_normal(gram, slope, control)
