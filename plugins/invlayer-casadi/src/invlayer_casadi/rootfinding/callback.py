"""Conditions written in torch, as a CasADi Function that calls back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import casadi as ca
import numpy as np

from invlayer_core import SampleProblem

__all__ = ["ResidualCallback"]


class _Callback(ca.Callback):
    """A Function of dense columns that keeps what its code raises, since CasADi would print and rename it."""

    def __init__(
        self, name: str, sizes: tuple[int, ...], shape: tuple[int, int], kept: list[BaseException]
    ) -> None:
        ca.Callback.__init__(self)
        self.sizes, self.shape, self.kept = sizes, shape, kept
        self.construct(name, {})

    def get_n_in(self) -> int:
        return len(self.sizes)

    def get_n_out(self) -> int:
        return 1

    def get_sparsity_in(self, i: int) -> ca.Sparsity:
        return ca.Sparsity.dense(self.sizes[i], 1) if i == 0 else ca.Sparsity(self.sizes[i], 1)

    def get_sparsity_out(self, _: int) -> ca.Sparsity:
        return ca.Sparsity.dense(*self.shape)

    def answer(self, function: Callable[[np.ndarray], np.ndarray], arguments: Any) -> list[Any]:
        """The function's value, or NaN from the first time on that it raises."""
        if not self.kept:
            try:
                return [function(np.array(arguments[0]).reshape(-1))]
            except BaseException as error:
                self.kept.append(error)
        return [ca.DM.nan(*self.shape)]


@final
class ResidualCallback(_Callback):
    """F of one sample, with its Jacobian.

    Parameters
    ----------
    problem : SampleProblem
    """

    def __init__(self, problem: SampleProblem) -> None:
        self.problem, self.evaluations = problem, 0
        self._jacobian: _JacobianCallback | None = None
        super().__init__("conditions", (problem.size,), (problem.size, 1), [])

    def eval(self, arguments: Any) -> list[Any]:
        self.evaluations += 1
        return self.answer(self.problem.residual, arguments)

    def has_jacobian(self) -> bool:
        return True

    def get_jacobian(self, name: str, *_: Any) -> ca.Function:
        self._jacobian = _JacobianCallback(name, self.problem, self.kept)
        return self._jacobian

    def raise_what_was_kept(self) -> None:
        """Raise the first exception that the conditions raised, with its own type."""
        if self.kept:
            raise self.kept[0]


@final
class _JacobianCallback(_Callback):
    """∂F/∂y; CasADi also offers F's value at the point, of which nothing is asked."""

    def __init__(self, name: str, problem: SampleProblem, kept: list[BaseException]) -> None:
        self.problem = problem
        super().__init__(name, (problem.size, problem.size), (problem.size, problem.size), kept)

    def eval(self, arguments: Any) -> list[Any]:
        return self.answer(self.problem.jacobian, arguments)
