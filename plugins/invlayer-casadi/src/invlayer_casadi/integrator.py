"""CasADi's integrators as layers, with the sensitivities that they integrate themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, final

import casadi as ca
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_casadi.expressions.expression import OnFailure
from invlayer_casadi.function import CasadiFunction
from invlayer_core import ConditionsError

__all__ = ["IntegratorProblem"]

_INPUTS: Final = ("x0", "z0", "p", "u")
_OUTPUTS: Final = ("xf", "zf", "qf")


@final
class IntegratorProblem:
    """The end of a trajectory as a function of its start, parameters and controls.

    Parameters
    ----------
    function : casadi.Function
        Made by ``casadi.integrator``.
    outputs : tuple of str
    single : bool
        Whether one output is returned as it is, and not as a tuple.
    on_failure : {"raise", "warn", "nan"}
    """

    def __init__(
        self, function: ca.Function, outputs: Sequence[str], single: bool, on_failure: OnFailure
    ) -> None:
        self.function, self.names, self.single, self.on_failure = function, tuple(outputs), single, on_failure
        self.inputs = [i for i, name in enumerate(_INPUTS) if function.numel_in(i)]
        kept = [_OUTPUTS.index(name) for name in self.names]
        with BUILDING:
            part = function.slice(function.name(), self.inputs, kept)
        self.part = CasadiFunction(part, backend="casadi", on_failure=on_failure)

    def __reduce__(self) -> tuple[Any, ...]:
        return IntegratorProblem, (self.function, self.names, self.single, self.on_failure)

    @classmethod
    def of(cls, function: Any, outputs: str | Sequence[str], on_failure: OnFailure) -> IntegratorProblem:
        """Check a user's choices.

        Raises
        ------
        ConditionsError
            If the Function is no integrator, or an output is not one of its own.
        """
        if not isinstance(function, ca.Function) or function.is_null() or not _is_integrator(function):
            raise ConditionsError(
                f"CasadiLayer.from_integrator({function!r}): accepted is a Function made by "
                "casadi.integrator."
            )
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        accepted = [name for i, name in enumerate(_OUTPUTS) if function.numel_out(i)]
        if not names or not set(names) <= set(accepted):
            raise ConditionsError(f"outputs={outputs!r}: accepted are one or more of {accepted}.")
        return cls(function, names, isinstance(outputs, str), on_failure)

    def solve(self, x0: Tensor, p: Any = None, u: Any = None, z0: Any = None) -> Any:
        """The outputs at the end, or at every time of the grid as columns."""
        given = {"x0": x0, "p": p, "u": u, "z0": z0}
        values = [self._value(_INPUTS[i], given, i) for i in self.inputs]
        extra = [
            name
            for name, value in given.items()
            if value is not None and _INPUTS.index(name) not in self.inputs
        ]
        if extra:
            raise ConditionsError(
                f"CasadiLayer of integrator {self.function.name()!r} came with {', '.join(extra)}; accepted "
                f"are {', '.join(_INPUTS[i] for i in self.inputs)}: the problem has no others."
            )
        results = self.part(*values)
        return results if self.single or isinstance(results, tuple) else (results,)

    def _value(self, name: str, given: dict[str, Any], place: int) -> Any:
        if given[name] is not None:
            return given[name]
        if name == "z0":  # a guess, which the integrator makes consistent
            return torch.zeros(
                self.function.numel_in(place), dtype=given["x0"].dtype, device=given["x0"].device
            )
        raise ConditionsError(
            f"CasadiLayer of integrator {self.function.name()!r}: {name} is missing; accepted are "
            f"{', '.join(_INPUTS[i] for i in self.inputs)}."
        )


def _is_integrator(function: ca.Function) -> bool:
    names = tuple(function.name_in(i) for i in range(min(4, function.n_in())))
    return (
        names == _INPUTS and tuple(function.name_out(i) for i in range(min(3, function.n_out()))) == _OUTPUTS
    )
