"""What a CasADi rootfinder Function solves, taken apart: conditions, their Jacobian, other outputs."""

from __future__ import annotations

from typing import Any, final

import casadi as ca
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_casadi.expressions.expression import Backend
from invlayer_casadi.expressions.ports import Port, input_ports
from invlayer_casadi.function import CasadiFunction
from invlayer_casadi.rootfinding.native import NativeRootfinder

__all__ = ["RootfinderProblem"]

_CLASSES = ("Newton", "FastNewton", "KinsolInterface", "ImplicitToNlp", "Bisection")


@final
class RootfinderProblem:
    """A rootfinder as the engine wants it: F(x, parameters) = 0, and a solver for it.

    Parameters
    ----------
    function : casadi.Function
        Made by ``casadi.rootfinder``.
    threads, backend : as in :class:`NativeRootfinder` and :class:`CasadiFunction`
    keywords : dict
        Those of :func:`invlayer_core.root`.
    """

    def __init__(
        self, function: ca.Function, threads: int, backend: Backend, keywords: dict[str, Any]
    ) -> None:
        if not isinstance(function, ca.Function) or function.class_name() not in _CLASSES:
            raise inv.ConditionsError(
                f"CasadiLayer.from_rootfinder({function!r}): accepted is a Function made by "
                "casadi.rootfinder; for conditions as such, give inv.root a CasadiFunction."
            )
        if not isinstance(threads, int) or threads < 1:
            raise inv.ConditionsError(f"threads={threads!r}: accepted is a number of threads >= 1.")
        self.function, self.threads, self.backend, self.keywords = function, threads, backend, keywords
        unknown, solution = _places(function)
        self.solver = NativeRootfinder(function, unknown, solution, threads)
        self.ports = list(input_ports(function))
        self.unknown = self.ports.pop(unknown)
        if self.unknown.sparsity.nnz() != self.unknown.sparsity.numel():
            raise inv.ConditionsError(
                f"CasadiLayer.from_rootfinder({function}): its unknown is sparse; accepted is a dense one."
            )
        with BUILDING:
            self._take_apart(function.oracle(), unknown, solution)

    def __reduce__(self) -> tuple[Any, ...]:
        return RootfinderProblem, (self.function, self.threads, self.backend, self.keywords)

    def _take_apart(self, oracle: ca.Function, unknown: int, solution: int) -> None:
        order = [unknown, *(i for i in range(oracle.n_in()) if i != unknown)]
        self.solution, self.outputs = solution, [j for j in range(oracle.n_out()) if j != solution]
        residual = oracle.slice("conditions", order, [solution])
        self.conditions = CasadiFunction(residual, backend=self.backend)
        self.others = (
            CasadiFunction(oracle.slice("others", order, self.outputs), backend=self.backend)
            if self.outputs
            else None
        )
        self.jacobian = None
        if len(self.unknown.event) == 1:
            self.jacobian = CasadiFunction(_jacobian(residual), backend=self.backend)

    def solve(self, *parameters: Any, x0: Tensor | None = None) -> Any:
        """The root, with the Function's other outputs where it has some; and the info, if asked for."""
        called = f"CasadiLayer of rootfinder {self.function.name()!r}"
        if len(parameters) != len(self.ports):
            raise inv.ConditionsError(
                f"{called} came with {len(parameters)} parameters; accepted are {len(self.ports)}: "
                f"{', '.join(port.name for port in self.ports) or 'none'}; the guess is x0=."
            )
        start = self._start(called, parameters, x0)
        batch = start.shape[: start.ndim - len(self.unknown.event)]
        nonzeros = tuple(_spread(port, p, batch) for port, p in zip(self.ports, parameters, strict=True))
        found = inv.root(
            self.conditions,
            start,
            parameters,
            solver=self.solver,
            options={"parameters": nonzeros},
            jacobian=self.jacobian,
            event_dims=len(self.unknown.event),
            **self.keywords,
        )
        x, *info = found if self.keywords.get("return_info") else (found,)
        results = self._with_others(x, parameters)
        return (results, *info) if info else results

    def _start(self, called: str, parameters: tuple[Any, ...], x0: Tensor | None) -> Tensor:
        """The guess, in the batch dims of all that is given."""
        tensors = [p for p in parameters if isinstance(p, Tensor)]
        like = x0 if x0 is not None else tensors[0] if tensors else torch.empty((), dtype=torch.float64)
        guess = like.new_zeros(self.unknown.event) if x0 is None else x0
        batches = [self.unknown.batch_of(guess, called)]
        batches += [
            port.batch_of(p, called)
            for port, p in zip(self.ports, parameters, strict=True)
            if isinstance(p, Tensor)
        ]
        return guess.expand(*torch.broadcast_shapes(*batches), *self.unknown.event)

    def _with_others(self, x: Tensor, parameters: tuple[Any, ...]) -> Any:
        if self.others is None:
            return x
        values = self.others(x, *parameters)
        results = list(values if isinstance(values, tuple) else (values,))
        results.insert(self.solution, x)
        return tuple(results)


def _spread(port: Port, parameter: Any, batch: torch.Size) -> Tensor:
    tensor = torch.as_tensor(parameter, dtype=None if isinstance(parameter, Tensor) else torch.float64)
    if tensor.ndim == 0:
        tensor = tensor.unsqueeze(-1)
    vector = port.nonzeros(tensor.detach())
    return vector.expand(*batch, vector.shape[-1])


def _places(function: ca.Function) -> tuple[int, int]:
    """Which input is the guess, and which output the root: CasADi names them after the unknown x0 and x."""
    oracle = function.oracle()
    for i in range(oracle.n_in()):
        if function.name_in(i) == oracle.name_in(i) + "0":
            unknown = i
            break
    else:
        unknown = 0
    name = oracle.name_in(unknown)
    for j in range(oracle.n_out()):
        if function.name_out(j) == name and function.name_out(j) != oracle.name_out(j):
            return unknown, j
    return unknown, 0


def _jacobian(residual: ca.Function) -> ca.Function:
    """∂F/∂x as a Function of the same inputs."""
    kind: Any = ca.SX if residual.is_a("SXFunction") else ca.MX
    inputs = [kind.sym(residual.name_in(i), residual.sparsity_in(i)) for i in range(residual.n_in())]
    return ca.Function("jacobian", inputs, [ca.jacobian(residual(*inputs), inputs[0])])
