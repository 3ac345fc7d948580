"""Any CasADi Function as a torch function with CasADi's own derivatives."""

from __future__ import annotations

from typing import Any, final, get_args

import casadi as ca
import torch
from torch import Size, Tensor

from invlayer_casadi.expressions.expression import Backend, Expression, OnFailure
from invlayer_casadi.expressions.ports import input_ports, output_ports
from invlayer_core import ConditionsError

__all__ = ["CasadiFunction"]


@final
class CasadiFunction:
    """A CasADi Function on batches of torch tensors, differentiable to any order by CasADi's symbolic AD.

    A column of r rows is a tensor ``(*batch, r)``, a scalar being ``(*batch, 1)``; any other matrix is
    ``(*batch, r, c)``. Structural zeros of an input are ignored, those of an output are zero. Batch dims
    broadcast. The result has the inputs' dtype and device; on a CPU all is computed in float64.

    Parameters
    ----------
    function : casadi.Function
        SX or MX; also with interpolants, Callbacks, root finders or integrators inside.
    backend : {"auto", "casadi", "torch"}
        Who evaluates: CasADi on the CPU; or torch, by a translation of the scalar instructions, where the
        tensors are. ``"auto"`` takes torch on any other device than the CPU, and for large batches on it, if
        there is a translation (``untranslatable`` tells why not); :meth:`backend_for` tells which.
    on_failure : {"raise", "warn", "nan"}
        Where a solver or integrator inside the Function fails for a sample: an error for the whole call; NaN
        for that sample, with a warning; or NaN in silence.

    Raises
    ------
    ConditionsError
        On a call, if a shape, dtype or device does not fit; with ``backend="torch"``, if there is no
        translation.
    UnsupportedTransformError
        In nested forward mode.

    Notes
    -----
    Derivatives follow CasADi's conventions: that of ``fmin(x, y)`` at x = y is ½ for both, and
    ``if_else(x > 0, sqrt(x), 0)`` has the derivative 0 for x ≤ 0, where a torch tape gives NaN.
    (Andersson et al., CasADi, Mathematical Programming Computation 11, 2019.)

    Examples
    --------
    >>> import casadi as ca, torch
    >>> x, p = ca.SX.sym("x", 2), ca.SX.sym("p")
    >>> f = CasadiFunction(ca.Function("f", [x, p], [x**2 - p]))
    >>> f(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0]))
    tensor([[ 0.,  3.],
            [ 8., 15.]])
    """

    def __init__(
        self, function: ca.Function, *, backend: Backend = "auto", on_failure: OnFailure = "warn"
    ) -> None:
        if not isinstance(function, ca.Function) or function.is_null():
            raise ConditionsError(
                f"CasadiFunction({type(function).__name__}): accepted is a casadi.Function, such as "
                "casadi.Function('f', [x, p], [x**2 - p])."
            )
        if backend not in get_args(Backend):
            raise ConditionsError(
                f"CasadiFunction(backend={backend!r}): accepted are "
                f"{', '.join(map(repr, get_args(Backend)))}."
            )
        if on_failure not in get_args(OnFailure):
            raise ConditionsError(
                f"CasadiFunction(on_failure={on_failure!r}): accepted are "
                f"{', '.join(map(repr, get_args(OnFailure)))}."
            )
        self.function, self.backend, self.on_failure = function, backend, on_failure
        self._expression = Expression(function, backend, on_failure)
        self._inputs, self._outputs = input_ports(function), output_ports(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.function, self.backend, self.on_failure)

    def __repr__(self) -> str:
        return f"CasadiFunction({self.function}, backend={self.backend!r})"

    @property
    def __name__(self) -> str:
        return str(self.function.name())

    @property
    def untranslatable(self) -> str | None:
        """Why there is no torch translation; None if there is one. The first call makes the translation."""
        return self._expression.untranslatable

    def backend_for(self, batch: int, device: str | torch.device = "cpu") -> str:
        """Who evaluates a batch of this size: ``"casadi"`` or ``"torch"``."""
        return self._expression.runs_on(batch, torch.device(device))

    def __call__(self, *inputs: Any) -> Any:
        """Evaluate; one output as a tensor, several as a tuple.

        Parameters
        ----------
        *inputs : Tensor of shape ``(*batch, r)`` or ``(*batch, r, c)``, or a number for a scalar
            One for each input of the Function.
        """
        tensors, dtype = self._read(inputs)
        pairs = list(zip(self._inputs, tensors, strict=True))
        batches = [port.batch_of(tensor, f"CasadiFunction {self.__name__}") for port, tensor in pairs]
        batch = self._common(batches)
        nonzeros = []
        for port, tensor in pairs:
            vector = port.nonzeros(tensor)
            nonzeros.append(vector.expand(*batch, vector.shape[-1]).to(dtype))
        results = self._expression(*nonzeros)
        dense = [port.dense(result) for port, result in zip(self._outputs, results, strict=True)]
        if dtype is not self._outcome_dtype(tensors):
            dense = [tensor.to(self._outcome_dtype(tensors)) for tensor in dense]
        return dense[0] if len(dense) == 1 else tuple(dense)

    def _read(self, inputs: tuple[Any, ...]) -> tuple[list[Tensor], torch.dtype]:
        """The inputs as tensors of one device, and the dtype to compute in."""
        if len(inputs) != len(self._inputs):
            names = ", ".join(port.name for port in self._inputs)
            raise ConditionsError(
                f"CasadiFunction {self.__name__} came with {len(inputs)} inputs; accepted are "
                f"{len(self._inputs)}: {names}."
            )
        given = [each for each in inputs if isinstance(each, Tensor)]
        devices = {tensor.device for tensor in given}
        if len(devices) > 1:
            raise ConditionsError(
                f"CasadiFunction {self.__name__} came with inputs on {sorted(map(str, devices))}; accepted "
                "is one device for all."
            )
        like = given[0] if given else torch.empty((), dtype=torch.float64)
        tensors = [
            each if isinstance(each, Tensor) else torch.as_tensor(each, dtype=like.dtype, device=like.device)
            for each in inputs
        ]
        tensors = [
            tensor.unsqueeze(-1) if tensor.ndim == 0 and not isinstance(each, Tensor) else tensor
            for tensor, each in zip(tensors, inputs, strict=True)
        ]
        dtype = self._outcome_dtype(tensors)
        return tensors, torch.float32 if dtype in (torch.half, torch.bfloat16) else dtype

    def _outcome_dtype(self, tensors: list[Tensor]) -> torch.dtype:
        dtype = torch.float64 if not tensors else tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def _common(self, batches: list[Size]) -> Size:
        try:
            return torch.broadcast_shapes(*batches) if batches else Size(())
        except RuntimeError as error:
            given = ", ".join(
                f"{p.name}: {tuple(batch)}" for p, batch in zip(self._inputs, batches, strict=True)
            )
            raise ConditionsError(
                f"CasadiFunction {self.__name__} came with batch dims that do not broadcast ({given}); "
                "accepted are equal dims, or 1, or none."
            ) from error


def _restored(function: ca.Function, backend: Backend, on_failure: OnFailure) -> CasadiFunction:
    return CasadiFunction(function, backend=backend, on_failure=on_failure)
