"""The forward solve: args → y*, without gradient, by any library, under any torch transform.

Outside ``torch.func`` a forward is simply called. Inside, its inputs are wrapped tensors that no library
can read; ``_OpaqueSolve`` lets torch unwrap them. A mapped dimension (``torch.vmap``) becomes one more
batch dimension of the conditions, so that a batched solver still runs once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Size, Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError, UnsupportedTransformError
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.recorded import RecordedIterations, not_recordable
from invlayer_core.inputs import NumpyFunction
from invlayer_core.leaves import EventDims
from invlayer_core.solvers.iterations import Iterations
from invlayer_core.structure import Arguments, SystemShape
from invlayer_core.structured import Structure, matches

__all__ = ["AroundForward", "CallableForward", "Forward", "Slices", "run_forward"]


class Forward(ABC):
    """A way to get y* from tensors; called with plain tensors only.

    Attributes
    ----------
    name : str
        For messages and ``info``.
    how : str
        How a batch is run, for ``info``.
    event_dims : int, or integers in the structure of y
        How many trailing dims of y are one system's unknowns.
    """

    name: str
    how: str
    event_dims: EventDims

    @abstractmethod
    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        """The solution in its full shape, and the outcome of every sample."""

    def iterations(self, tensors: Sequence[Tensor], called: str) -> Iterations:
        """The iterations of the solver, for the adjoint ``called`` so to record them.

        Raises
        ------
        ConditionsError
            If they cannot be recorded.
        """
        raise not_recordable(called, self.name)

    def resolver(self, tensors: Sequence[Tensor], called: str) -> Callable[[System, Tensor], Tensor]:
        """A function ``(system, start) -> y`` that solves other systems by the same solver.

        Raises
        ------
        ConditionsError
            If the solver knows no other system than its own.
        """
        raise ConditionsError(
            f"adjoint={called} came with {self.name!r}, a function of your own, which cannot be given "
            "another objective. Accepted is a registered solver, by its name; or resolve=False."
        )

    @abstractmethod
    def mapped(self, size: int, dims: Sequence[int | None]) -> Forward:
        """The same forward for tensors with one more dimension (``dims`` as in ``torch.vmap``)."""

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        """The tensors as the mapped forward wants them."""
        return tuple(tensors)


@final
@dataclass(frozen=True)
class CallableForward(Forward):
    """The user's own solver function, called once on the whole batch; tensors are θ."""

    function: Callable[..., Any]
    arguments: Arguments
    event_dims: EventDims
    has_aux: bool = False
    expected: Size | None = None
    name: str = "solver function"
    how: str = "whole"

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        result = self.function(*self.arguments.unflatten(tensors))
        aux: tuple[Any, ...] = ()
        if self.has_aux and type(result) is tuple and len(result) == 2 and not self._is_y(result):
            result, aux = result[0], (result[1],)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            if self.expected is None:
                return self._packed(result, aux)
            what = f"dtype {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            raise ConditionsError(
                f"{self.name} returned {what}; accepted is one real floating-point torch.Tensor y. "
                "Wrap a NumPy function with inv.from_numpy(fn)."
            )
        if self.expected is not None and result.shape != self.expected:
            raise ConditionsError(
                f"{self.name} returned y of shape {tuple(result.shape)}; accepted is the shape of y0, "
                f"{tuple(self.expected)}."
            )
        y = result.detach().clone()  # the solver may go on using its own tensor
        return y, Outcome.without_claims(y, SystemShape.of(y, self.event_dims).batch, aux)

    def _is_y(self, pair: tuple[Any, ...]) -> bool:
        """Whether a pair is y itself: only if ``event_dims`` has its structure."""
        return not isinstance(self.event_dims, int) and matches(self.event_dims, pair)

    def _packed(self, result: Any, aux: tuple[Any, ...]) -> tuple[Tensor, Outcome]:
        """A complex tensor, or a pytree of tensors, as one real vector per sample."""
        if isinstance(self.function, NumpyFunction):
            result = self.function.as_tensors(result)
        structure = Structure.of(self.name, "y", result, self.event_dims)
        y = structure.pack(self.name, result).detach()
        return y, Outcome.without_claims(y, y.shape[:-1], aux, structure)

    def mapped(self, size: int, dims: Sequence[int | None]) -> Slices:
        return Slices(self, size, tuple(dims))


class AroundForward(Forward):
    """A forward around another one, whose name, way of running and event dims are its own.

    Attributes
    ----------
    inner : Forward
    """

    inner: Forward

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def how(self) -> str:  # type: ignore[override]
        return self.inner.how

    @property
    def event_dims(self) -> EventDims:  # type: ignore[override]
        return self.inner.event_dims


@final
@dataclass(frozen=True)
class Slices(AroundForward):
    """A forward that is run once per slice of a mapped dimension: its batch rule is not ours to guess."""

    inner: Forward
    size: int
    dims: tuple[int | None, ...]

    @property
    def expected(self) -> Size | None:
        """The shape of y, if it is known before the solve: from y0, the first of the tensors."""
        inner = getattr(self.inner, "expected", None)
        return None if inner is None else Size((self.size, *inner))

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        if self.size == 0:
            return self._no_slices(tensors)
        runs = [
            self.inner.run(
                [t if d is None else t.select(d, i) for t, d in zip(tensors, self.dims, strict=True)]
            )
            for i in range(self.size)
        ]
        outcomes = [outcome for _, outcome in runs]
        joined = Outcome(
            y=torch.stack([outcome.y for outcome in outcomes]),
            status=torch.stack([outcome.status for outcome in outcomes]),
            iterations=torch.stack([outcome.iterations for outcome in outcomes]),
            message=tuple(message for outcome in outcomes for message in outcome.message),
            cause=next((outcome.cause for outcome in outcomes if outcome.cause is not None), None),
            aux=tuple(aux for outcome in outcomes for aux in outcome.aux),
            structure=_same_structure(self.name, outcomes),
            how=outcomes[0].how,
            why=outcomes[0].why,
            start=_stacked([outcome.start for outcome in outcomes]),
        )
        return torch.stack([y for y, _ in runs]), joined

    def _no_slices(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        if self.expected is None:
            raise UnsupportedTransformError(
                f"{self.name} under torch.vmap over a dimension of size 0: it is called for no slice, "
                "so that the shape of y is unknown; accepted is a dimension of size 1 or more."
            )
        y = tensors[0].new_empty(self.expected)
        return y, Outcome.without_claims(y, SystemShape.of(y, self.event_dims).batch, ())

    def mapped(self, size: int, dims: Sequence[int | None]) -> Slices:
        return Slices(self, size, tuple(dims))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(given) if given else None


def _same_structure(name: str, outcomes: Sequence[Outcome]) -> Structure | None:
    first = outcomes[0].structure if outcomes else None
    if any(outcome.structure != first for outcome in outcomes):
        raise ConditionsError(
            f"{name} returned y of another structure, shape or dtype for one slice of a mapped dimension "
            "(torch.vmap) than for another; accepted is the same for all."
        )
    return first


@final
class _Record:
    """Where an outcome is left: torch passes only tensors out of a Function, and takes lists apart."""

    outcome: Outcome | None = None


@final
@_functorch.with_cached_signature
class _OpaqueSolve(torch.autograd.Function):
    """A forward as torch sees it: plain tensors in, plain tensors out, no derivative."""

    @staticmethod
    def forward(forward: Forward, record: _Record, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, outcome = forward.run(tensors)
        record.outcome = outcome
        event_dims = forward.event_dims if outcome.structure is None else 1
        return y, outcome.status.reshape(SystemShape.of(y, event_dims).batch).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise AssertionError("the opaque solve has no derivative; its inputs are detached")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], forward: Forward, record: _Record, *tensors: Tensor) -> Any:
        dims = in_dims[2:]
        mapped = forward.mapped(info.batch_size, dims)
        tensors = forward.moved(tensors, dims, info.batch_size)
        return _OpaqueSolve.apply(mapped, record, *tensors), (0, 0)


def run_forward(
    forward: Forward, tensors: Sequence[Tensor], iterations: Iterations | None = None
) -> tuple[Tensor, Tensor | None, Outcome]:
    """Solve, whatever transform is running.

    Parameters
    ----------
    forward : Forward
    tensors : sequence of Tensor
    iterations : Iterations, optional
        Of ``forward``: the solve is to run by them, on the graph.

    Returns
    -------
    y : Tensor of shape ``(*batch, *event)``
        Without gradient, wrapped like the inputs.
    status : Tensor of int64, or None
        The solver's claims, ``(*batch,)``, wrapped like the inputs; None: as in ``outcome``.
    outcome : Outcome
        Of the whole (folded) batch, plain.
    """
    if iterations is not None and isinstance(iterations, RecordedIterations):
        y, outcome = iterations.run()
        return y, outcome.status.reshape(SystemShape.of(y, forward.event_dims).batch), outcome
    detached = [tensor.detach() for tensor in tensors]
    if not _functorch.is_active():
        with torch.no_grad(), _functorch.own_saved_tensors():
            y, outcome = forward.run(detached)
        return y, None, outcome
    record = _Record()
    with _functorch.own_saved_tensors():
        y, status = _OpaqueSolve.apply(forward, record, *detached)
    assert record.outcome is not None
    return y, status, record.outcome
