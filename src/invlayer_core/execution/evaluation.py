"""How one system of a batch is evaluated, with as little around a cheap F as can be.

Many a solver asks twice for the same: SciPy's hybr evaluates F and J at its start once to see their shapes,
and once more to work with. What was asked last is therefore remembered, and what every sample will ask first,
F and J at y0, is evaluated for the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Size, Tensor

from invlayer_core.execution.samples import resting_rows, to_numpy
from invlayer_core.solvers.contract import BatchProblem

if TYPE_CHECKING:
    from invlayer_core.execution.workload import Workload

__all__ = [
    "AmongOthers",
    "Ask",
    "AtStart",
    "Function",
    "Remembering",
    "Row",
    "RowForm",
    "ScalarFunction",
    "as_tensor",
    "evaluate_starts",
]

Function = Callable[["np.ndarray"], "np.ndarray"]
"""What a solver calls: from a point to a value, both float64 NumPy."""

ScalarFunction = Callable[[float], float]

Ask = Callable[[str], Function]
"""How a system is evaluated: to the name of a method of :class:`Problem` its function."""

_REPEATS = 12  # answers from memory: a solver that asks the same for ever must be seen to do so
_ENTRIES = 2**22  # of Jacobians that are taken before anyone asks


@final
@dataclass(frozen=True, eq=False)
class AtStart:
    """F, and J if it will be asked for, of every sample at its start: ``(B, n)`` and ``(B, n, n)``."""

    points: np.ndarray
    residual: np.ndarray
    jacobian: np.ndarray | None

    def of(self, index: int) -> tuple[bytes, dict[str, np.ndarray]]:
        """Where sample ``index`` starts, and what is known there."""
        known: dict[str, np.ndarray] = {"residual": self.residual[index]}
        if self.jacobian is not None:
            known["jacobian"] = self.jacobian[index]
        return self.points[index].tobytes(), known


def evaluate_starts(problem: BatchProblem, y0: Tensor, *, jacobian: bool) -> AtStart | None:
    """F and J at y0 for all samples in one call each; None if F raises there, whatever it raises.

    Nothing is lost then: each solve asks for the same, and what it gets stays with its sample.
    """
    rows = resting_rows(y0)
    try:
        residual = problem.residual(rows)
        fits = jacobian and problem.batch * problem.size**2 <= _ENTRIES
        blocks = to_numpy(problem.jacobian(rows)) if fits else None
    except Exception:  # of F, or for want of memory; see above
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

    def __init__(self, ask: Ask, point: bytes, known: dict[str, np.ndarray]) -> None:
        self._ask, self._point, self._known = ask, point, known
        self._left = _REPEATS

    def __call__(self, wanted: str) -> Function:
        asked = self._ask(wanted)

        def remembered(y: np.ndarray) -> np.ndarray:
            return self._at_start(wanted, asked, y) if self._left else asked(y)

        return remembered

    def _at_start(self, wanted: str, asked: Function, y: np.ndarray) -> np.ndarray:
        if getattr(y, "dtype", None) != "float64" or y.tobytes() != self._point:
            self._left = 0  # it has left, and few solvers come back
            return asked(y)
        self._left -= 1
        if (value := self._known.get(wanted)) is None:
            value = self._known[wanted] = asked(y)
        return value.copy()  # the solver may overwrite its own


def as_tensor(y: np.ndarray, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A solver's point in this shape, in the dtype and on the device of ``like``."""
    try:
        row = torch.from_numpy(y.reshape(shape))  # NumPy reshapes ten times as fast as torch
    except (TypeError, AttributeError):  # a list, or an unusual dtype
        row = torch.as_tensor(y, dtype=torch.float64).reshape(shape)
    return row if row.dtype is like.dtype and like.is_cpu else row.to(like)


@final
@dataclass(frozen=True, eq=False)
class RowForm:
    """What all systems of a batch have in common when each is evaluated by itself.

    Attributes
    ----------
    functions : mapping of str to callable
        F (``"residual"``) and the parts of the problem; empty if they cannot simply be called, as they
        capture tensors for which others are to stand.
    batch, shape : torch.Size
        Of a batch of one, and of y in it.
    like : Tensor
        Of the dtype and on the device of y.
    """

    functions: Mapping[str, Callable[..., Any]]
    batch: Size
    shape: Size
    like: Tensor

    @cached_property
    def on_host(self) -> bool:
        """Whether values need no conversion."""
        return self.like.device.type == "cpu" and self.like.dtype is torch.float64

    def is_sound(self, wanted: str, value: Any) -> bool:
        """Whether a function returned what it should; if not, the careful way tells what is wrong."""
        if not isinstance(value, Tensor) or value.dtype is not self.like.dtype:
            return False
        if wanted == "residual":
            return value.shape == self.shape
        return value.shape[: len(self.batch)] == self.batch


@final
class Row:
    """The evaluation of one system by itself, as a batch of one."""

    def __init__(self, workload: Workload, index: int) -> None:
        self._workload, self._index = workload, index
        self._form = workload.row_form
        self._args = workload.args_of(index) if self._form.functions else ()

    def __call__(self, wanted: str) -> Function:
        function = self._form.functions.get(wanted)
        return partial(self._careful, wanted) if function is None else self._quick(wanted, function)

    def _quick(self, wanted: str, function: Callable[..., Any]) -> Function:
        form, args = self._form, self._args
        like, shape, on_host = form.like, form.shape, form.on_host

        def evaluated(y: np.ndarray) -> np.ndarray:
            value: Any = function(as_tensor(y, like, shape), *args)
            if not form.is_sound(wanted, value):
                return self._careful(wanted, y)
            array: np.ndarray = value.numpy() if on_host and not value.requires_grad else to_numpy(value)
            if wanted == "residual":
                return array.flatten()
            return array.reshape(array.shape[len(form.batch) :]).copy()

        return evaluated

    def scalar(self) -> ScalarFunction | None:
        """F of one equation in one unknown as a function of numbers: half the cost around a cheap F."""
        function = self._form.functions.get("residual")
        return None if function is None else partial(self._number, function, self._args)

    def _number(self, function: Callable[..., Any], args: tuple[Any, ...], x: float) -> float:
        form = self._form
        value: Any = function(form.like.new_full(form.shape, x), *args)
        if form.is_sound("residual", value):
            number: float = value.item()
            return number
        return float(self._careful("residual", np.array([x], dtype=np.float64))[0])

    def _careful(self, wanted: str, y: np.ndarray) -> np.ndarray:
        return to_numpy(getattr(self._alone, wanted)(as_tensor(y, self._form.like, (1, -1)))[0])

    @cached_property
    def _alone(self) -> BatchProblem:
        return self._workload.rows(self._index, self._index + 1).problem()


@final
class AmongOthers:
    """The evaluation of one system of a batch that cannot be divided, every other row at rest."""

    def __init__(self, workload: Workload, index: int) -> None:
        self._problem, self._index = workload.problem(), index
        self._rest = resting_rows(workload.y0)

    def __call__(self, wanted: str) -> Function:
        return partial(self._evaluate, wanted)

    def _evaluate(self, wanted: str, y: np.ndarray) -> np.ndarray:
        rows = self._rest.clone()
        rows[self._index] = as_tensor(y, rows, (-1,))
        return to_numpy(getattr(self._problem, wanted)(rows)[self._index])
