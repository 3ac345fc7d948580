"""Functions written in torch, as CasADi Functions that call back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import casadi as ca
import numpy as np

__all__ = ["FunctionCallback", "Interruption"]

_ArrayFunction = Callable[[np.ndarray], Any]


@final
class Interruption:
    """What the functions of one solve have raised: CasADi would print it and give it another type."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.calls = 0

    def value(self, function: _ArrayFunction, point: Any, shape: tuple[int, int]) -> list[Any]:
        """The function's value, or NaN from the first time on that one raises."""
        self.calls += 1
        if self.error is None:
            try:
                return [np.reshape(function(np.array(point).reshape(-1)), shape)]
            except BaseException as error:
                self.error = error
        return [ca.DM.nan(*shape)]

    def raise_it(self) -> None:
        """Raise the first exception, with its own type."""
        if self.error is not None:
            raise self.error


class _Callback(ca.Callback):
    """A Function of one vector, the first of its inputs."""

    def __init__(
        self, name: str, inputs: list[ca.Sparsity], shape: tuple[int, int], function: _ArrayFunction,
        interruption: Interruption,
    ) -> None:  # fmt: skip
        ca.Callback.__init__(self)
        self.inputs, self.shape, self.function, self.interruption = inputs, shape, function, interruption
        self.construct(name, {})

    def get_n_in(self) -> int:
        return len(self.inputs)

    def get_n_out(self) -> int:
        return 1

    def get_sparsity_in(self, i: int) -> ca.Sparsity:
        return self.inputs[i]

    def get_sparsity_out(self, _: int) -> ca.Sparsity:
        return ca.Sparsity.dense(*self.shape)

    def eval(self, arguments: Any) -> list[Any]:
        return self.interruption.value(self.function, arguments[0], self.shape)


@final
class FunctionCallback(_Callback):
    """``(n,) -> (m,)`` with its Jacobian ``(m, n)``.

    Parameters
    ----------
    name : str
    unknowns, values : int
        n and m.
    function, jacobian : callable
        Of float64 NumPy vectors.
    interruption : Interruption
        Where exceptions are kept.
    """

    def __init__(
        self, name: str, unknowns: int, values: int, function: _ArrayFunction, jacobian: _ArrayFunction,
        interruption: Interruption,
    ) -> None:  # fmt: skip
        self._jacobian_function = jacobian
        self._jacobian: _Callback | None = None
        super().__init__(name, [ca.Sparsity.dense(unknowns, 1)], (values, 1), function, interruption)

    def has_jacobian(self) -> bool:
        return True

    def get_jacobian(self, name: str, *_: Any) -> ca.Function:
        """Of the point, and of the value there, of which nothing is asked; kept alive here."""
        point, values = self.inputs[0], self.shape[0]
        self._jacobian = _Callback(
            name, [point, ca.Sparsity(values, 1)], (values, point.size1()), self._jacobian_function,
            self.interruption,
        )  # fmt: skip
        return self._jacobian
