"""How one system of a batch is evaluated, with as little around a cheap F as can be.

Many a solver asks twice for the same: SciPy's hybr evaluates F and J at its start once to see their shapes,
and once more to work with. What was asked last is therefore remembered, and what every sample will ask first,
F and J at y0, is evaluated for the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from invlayer_core.execution.samples import resting_rows, to_numpy
from invlayer_core.solvers.contract import BatchProblem

if TYPE_CHECKING:
    import numpy as np

    from invlayer_core.execution.workload import Workload

__all__ = ["AmongOthers", "Ask", "AtStart", "Remembering", "Row", "Wanted", "as_tensor", "evaluate_starts"]

Wanted = Literal["residual", "jacobian", "second_derivative"]
Ask = Callable[[Wanted, "np.ndarray"], "np.ndarray"]

_REPEATS = 12  # answers from memory: a solver that asks the same for ever must be seen to do so
_ENTRIES = 2**22  # of Jacobians that are taken before anyone asks


@final
@dataclass(frozen=True, eq=False)
class AtStart:
    """F, and J if it will be asked for, of every sample at its start: ``(B, n)`` and ``(B, n, n)``."""

    points: np.ndarray
    residual: np.ndarray
    jacobian: np.ndarray | None

    def of(self, index: int) -> tuple[bytes, dict[Wanted, np.ndarray]]:
        """Where sample ``index`` starts, and what is known there."""
        known: dict[Wanted, np.ndarray] = {"residual": self.residual[index]}
        if self.jacobian is not None:
            known["jacobian"] = self.jacobian[index]
        return self.points[index].tobytes(), known


def evaluate_starts(problem: BatchProblem, y0: Tensor, *, jacobian: bool) -> AtStart | None:
    """F and J at y0 for all samples in one call each; None if F refuses that, which its solves will tell."""
    rows = resting_rows(y0)
    try:
        residual = problem.residual(rows)
        fits = jacobian and problem.batch * problem.size**2 <= _ENTRIES
        blocks = to_numpy(problem.jacobian(rows)) if fits else None
    except Exception:
        return None
    return AtStart(to_numpy(rows), to_numpy(residual), blocks)


@final
class Remembering:
    """Asks, except for what is known at the start or has been asked there before.

    Parameters
    ----------
    ask : callable
    point, known
        The start, and what is known there.
    """

    def __init__(self, ask: Ask, point: bytes, known: dict[Wanted, np.ndarray]) -> None:
        self._ask, self._point, self._known = ask, point, known
        self._left = _REPEATS

    def __call__(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        if self._left:
            return self._at_start(wanted, y)
        return self._ask(wanted, y)

    def _at_start(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        if getattr(y, "dtype", None) != "float64" or y.tobytes() != self._point:
            self._left = 0  # it has left, and few solvers come back
            return self._ask(wanted, y)
        self._left -= 1
        if (value := self._known.get(wanted)) is None:
            value = self._known[wanted] = self._ask(wanted, y)
        return value.copy()  # the solver may overwrite its own


def as_tensor(y: np.ndarray, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A solver's point in this shape, in the dtype and on the device of ``like``."""
    try:
        row = torch.from_numpy(y.reshape(shape))  # NumPy reshapes ten times as fast as torch
    except (TypeError, AttributeError):  # a list, or an unusual dtype
        row = torch.as_tensor(y, dtype=torch.float64).reshape(shape)
    return row if row.dtype is like.dtype and row.device == like.device else row.to(like)


@final
class Row:
    """The evaluation of one system by itself, as a batch of one."""

    def __init__(self, workload: Workload, index: int) -> None:
        self._workload, self._index, self._like = workload, index, workload.y0
        self._problem: BatchProblem | None = None
        theta, self._shape = workload.row_of(index)
        self._function, system = workload.system.function, workload.system
        # What F captures, or what stands elsewhere in its modules now, takes the careful way.
        self._args = None if system.needs_care else system.arguments.unflatten(theta)
        self._on_host = self._like.device.type == "cpu" and self._like.dtype is torch.float64

    def __call__(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        if wanted == "residual" and self._args is not None:
            value: Any = self._function(as_tensor(y, self._like, self._shape), *self._args)
            if (  # what F should return; if it is not, the careful way tells what is wrong
                type(value) is Tensor
                and value.shape == self._shape
                and value.dtype is self._like.dtype
                and not value.requires_grad
            ):
                array: np.ndarray = value.numpy() if self._on_host else to_numpy(value)
                return array.reshape(-1).copy()
        return to_numpy(getattr(self._alone(), wanted)(as_tensor(y, self._like, (1, -1)))[0])

    def _alone(self) -> BatchProblem:
        if self._problem is None:
            self._problem = self._workload.rows(self._index, self._index + 1).problem()
        return self._problem


@final
class AmongOthers:
    """The evaluation of one system of a batch that cannot be divided, every other row at rest."""

    def __init__(self, workload: Workload, index: int) -> None:
        self._problem, self._index = workload.problem(), index
        self._rest = resting_rows(workload.y0)

    def __call__(self, wanted: Wanted, y: np.ndarray) -> np.ndarray:
        rows = self._rest.clone()
        rows[self._index] = as_tensor(y, rows, (-1,))
        return to_numpy(getattr(self._problem, wanted)(rows)[self._index])
