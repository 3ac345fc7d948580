"""A CasADi Function called from one thread through its buffers: 1 to 3 µs a call instead of 45.

CasADi releases the GIL while a Function runs. Plain expressions keep their memory apart and may be shared
between threads; a Function that holds a solver crashes the interpreter, so every thread gets its own copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from threading import Lock, RLock, local
from typing import Any, Final, final

import casadi as ca
import numpy as np

__all__ = ["BUILDING", "FunctionBuffer", "ThreadFunctions", "holds_solver"]

BUILDING: Final = RLock()
"""Held while Functions are made: they share symbols, and plugins load on first use."""

_PURE: Final = frozenset(
    {"SXFunction", "MXFunction", "Map", "MapSum", "Switch", "BSplineInterpolant", "LinearInterpolant"}
)
_SIZES: Final = 8  # batch sizes whose maps are kept


def holds_solver(function: ca.Function) -> bool:
    """Whether a call may fail, or must not be shared: a solver, integrator or Callback is inside."""
    if function.class_name() not in _PURE:
        return True
    return any(inner.class_name() not in _PURE for inner in function.find_functions())


@final
class FunctionBuffer:
    """One Function with its own memory, for one thread at a time; float64 arrays are used in place."""

    def __init__(self, function: ca.Function) -> None:
        self.function = function
        buffer: Any
        buffer, self._trigger = function.buffer()
        self._buffer = buffer  # CasADi's type stubs want a size beside each view

    def __call__(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Evaluate; arrays are contiguous, and hold the nonzeros, column by column.

        Raises
        ------
        RuntimeError
            In CasADi's words, if a solver inside fails.
        """
        given, wanted = ([array.reshape(-1) for array in arrays] for arrays in (inputs, outputs))
        for i, array in enumerate(given):
            if array.size:
                self._buffer.set_arg(i, array.data)
        for i, array in enumerate(wanted):
            if array.size:
                assert outputs[i].flags.c_contiguous  # results are written in place
                self._buffer.set_res(i, array.data)
        self._trigger()
        if self._buffer.ret():
            raise RuntimeError(f"{self.function.name()} returned {self._buffer.ret()}")

    def stats(self) -> dict[str, Any]:
        """What the solver tells about the last call."""
        found: dict[str, Any] = self._buffer.stats()
        return found


@final
class ThreadFunctions:
    """A Function, or a copy of it for every thread, with its maps over a batch.

    Parameters
    ----------
    function : casadi.Function
    """

    def __init__(self, function: ca.Function) -> None:
        self.function = function
        self.has_solver = holds_solver(function)
        self.lock: Any = None  # held during a call where the Function cannot be copied
        self._local = local()
        self._serialised: str | None = None
        if self.has_solver:
            with BUILDING:
                self._try_copy()

    def _try_copy(self) -> None:
        try:
            self._serialised = self.function.serialize()
            ca.Function.deserialize(self._serialised)
        except RuntimeError:  # a Callback, or a plugin such as kinsol
            self._serialised, self.lock = None, Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadFunctions, (self.function,)

    def buffer(self, batch: int) -> FunctionBuffer:
        """The buffer of this thread for ``batch`` samples at once."""
        buffers: OrderedDict[int, FunctionBuffer] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = OrderedDict()
        found = buffers.get(batch)
        if found is None:
            with BUILDING:
                own = self._own()
                found = FunctionBuffer(own if batch == 1 else own.map(batch))
            buffers[batch] = found
            while len(buffers) > _SIZES:
                buffers.popitem(last=False)
        buffers.move_to_end(batch)
        return found

    def _own(self) -> ca.Function:
        if self._serialised is None:
            return self.function
        own: ca.Function | None = getattr(self._local, "function", None)
        if own is None:
            own = self._local.function = ca.Function.deserialize(self._serialised)
        return own

    def exclusive(self) -> Any:
        """What to hold during a call: a lock, if the Function could not be copied for this thread."""
        return nullcontext() if self.lock is None else self.lock
