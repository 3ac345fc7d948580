"""The forward solve of a batch of cone programs by a per-program solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Size, Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.cones.structure import ConeStructure
from invlayer_core.conditions.polyhedral import PolyhedralForm
from invlayer_core.execution.forward import AroundForward, Forward
from invlayer_core.execution.limits import progress_bar
from invlayer_core.execution.native_threads import single_native_thread
from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord, SampleReport, report_of, to_numpy
from invlayer_core.solvers.cone import ConeProblem
from invlayer_core.solvers.contract import Solver

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ConeForward", "PolyhedralForward"]


@final
@dataclass(frozen=True)
class ConeForward(Forward):
    """A registered solver on cone programs; tensors are ``(P, q, A, b)``, or those and a point to start from.

    Attributes
    ----------
    name : str
    solver : Solver
    structure : ConeStructure
    options : mapping
    workers : int
        How many programs are solved at a time, each in a thread of its own.
    progress : bool
    """

    name: str
    solver: Solver
    structure: ConeStructure
    options: Mapping[str, Any]
    workers: int = 1
    progress: bool = False
    event_dims: int = 1

    @property
    def how(self) -> str:  # type: ignore[override]
        return "serial" if self.workers == 1 else "threads"

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        batch = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
        problems = list(_problems(self.structure, tensors, batch))
        size = self.structure.size + self.structure.equations
        with progress_bar(len(problems), show=self.progress) as done:
            record = SampleRecord(tensors[1].new_empty(len(problems), size), done)
            for index, report in enumerate(self._reports(problems)):
                record.add(index, report)
        outcome = record.outcome(self.how)
        return outcome.y.reshape(*batch, size), outcome

    def _reports(self, problems: list[ConeProblem]) -> Iterable[SampleReport]:
        if self.workers == 1 or len(problems) < 2:
            yield from map(self._report, problems)
            return
        with single_native_thread(), ThreadPoolExecutor(self.workers, "invlayer") as pool:
            yield from pool.map(self._report, problems)

    def _report(self, problem: ConeProblem) -> SampleReport:
        solve: Callable[[], Any] = lambda: self.solver.solve(problem, None, dict(self.options))  # noqa: E731
        report = report_of(solve, problem.size)
        return report if report.y is None else replace(report, aux={**report.aux, "z": report.y})

    def mapped(self, size: int, dims: Sequence[int | None]) -> ConeForward:
        return self

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        return _moved(tensors, dims, size, [1] * len(tensors))


@final
@dataclass(frozen=True)
class PolyhedralForward(AroundForward):
    """The same for programs that are quadratic ones: their arguments come first, and y is (x, multipliers).

    Attributes
    ----------
    inner : ConeForward
    form : PolyhedralForm
    """

    inner: ConeForward
    form: PolyhedralForm

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        z, outcome = self.inner.run(tensors[len(self.form.layout.names) :])
        return self.form.unknowns(z), outcome

    def mapped(self, size: int, dims: Sequence[int | None]) -> PolyhedralForward:
        return self

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        layout = self.form.layout
        event_dims = [layout.event_dims(name) for name in layout.names]
        return _moved(tensors, dims, size, event_dims + [1] * (len(tensors) - len(event_dims)))


def _moved(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, event_dims: Sequence[int]
) -> tuple[Tensor, ...]:
    """The mapped dimension in front of all batch dims that any of the tensors has."""
    ranks = [t.ndim - e - (dim is not None) for t, e, dim in zip(tensors, event_dims, dims, strict=True)]
    return tuple(
        tensor if dim is None else _in_front(_functorch.mapped_first(tensor, dim, size), max(ranks) - rank)
        for tensor, dim, rank in zip(tensors, dims, ranks, strict=True)
    )


def _in_front(tensor: Tensor, missing: int) -> Tensor:
    return tensor.reshape(tensor.shape[0], *(1 for _ in range(missing)), *tensor.shape[1:])


def _problems(structure: ConeStructure, tensors: Sequence[Tensor], batch: Size) -> Iterable[ConeProblem]:
    """One program per sample; what all samples share is one array."""
    columns = [_rows(tensor, batch) for tensor in tensors]
    n, m = structure.size, structure.equations
    for index in range(batch.numel()):
        P, q, A, b, *start = (column[index % len(column)] for column in columns)
        known = None
        if start and bool(torch.from_numpy(start[0]).isfinite().all()):
            known = start[0][:n], start[0][n : n + m], start[0][n + m :]
        yield ConeProblem(structure, P, q, A, b, index, known)


def _rows(tensor: Tensor, batch: Size) -> np.ndarray:
    if tensor.ndim > 1:
        tensor = tensor.expand(*batch, tensor.shape[-1]).reshape(batch.numel(), tensor.shape[-1])
    return to_numpy(torch.atleast_2d(tensor))
