"""Which tensors of a batch have one row per sample, found by measurement and not by their shapes.

F is a whole-tensor function. Were every evaluation for one sample one of the whole batch, B samples would
cost B² rows. So before a batch is divided, F is tried: every tensor whose leading dims are those of the
batch gets NaN in all rows but one, and it is rowwise if that sample's residual does not change by a bit.
What is then cut out has to give the same residual. If F refuses any of this, the batch stays whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from invlayer_core.execution.evaluation import Row
from invlayer_core.execution.samples import resting_rows, to_numpy
from invlayer_core.execution.workload import Workload

__all__ = ["Probe", "probe"]

_TURNS: Final = 5  # evaluations of one sample, of which the quickest counts
_CHEAP: Final = 1e-3  # seconds of F that may be spent on knowing better


@final
@dataclass(frozen=True)
class Probe:
    """What trying F has shown.

    Attributes
    ----------
    rowwise : tuple of bool, or None
        Which of θ have one row per sample; None if a part of the batch cannot be evaluated alone.
    whole, alone : float
        Seconds for F of the whole batch, and for F of one sample alone, if they were asked for.
    refusal : str
        What F raised when it was tried; empty if it did not.
    """

    rowwise: tuple[bool, ...] | None
    whole: float
    alone: float
    refusal: str = ""


@final
class _Refused(Exception):  # noqa: N818 (no error: the batch stays whole)
    """F raised where it was tried."""


def probe(workload: Workload, *, timed: bool = True) -> Probe:
    """Try F on the whole batch and on parts of it, if ``timed`` as often as it takes to know the seconds.

    An F that raises here is no failure yet: its solve will tell. Nothing else that raises is taken for F.
    """
    y = _generic(resting_rows(workload.y0))
    try:
        whole, reference = _timed(workload, y)
        if timed and whole < _CHEAP:  # the first call of anything is slow
            whole = min(whole, _timed(workload, y)[0])
        finite = reference.isfinite().all(-1).nonzero()
        if not len(finite):
            return Probe(None, whole, whole)
        row = int(finite[len(finite) // 2])
        rowwise = _rowwise(workload, y, reference[row], row)
        divided = replace(workload, rowwise=rowwise)
        if not _agrees(divided, y, reference, row):
            return Probe(None, whole, whole)
        return Probe(rowwise, whole, _seconds_alone(divided, y, row) if timed else 0.0)
    except _Refused as refused:
        return Probe(None, 0.0, 0.0, str(refused))


def _generic(y: Tensor) -> Tensor:
    """Near ``y``, where no component is special."""
    steps = torch.arange(1, y.numel() + 1, dtype=y.dtype, device=y.device).reshape(y.shape)
    return y + 1e-3 * (1 + y.abs()) * (0.5 + (7.0 * steps.sqrt()).frac())


def _timed(workload: Workload, y: Tensor) -> tuple[float, Tensor]:
    began = time.perf_counter()
    residual = _tried(workload, y)
    return time.perf_counter() - began, residual


def _tried(workload: Workload, y: Tensor) -> Tensor:
    try:
        return workload.everything(y) if workload.system.parts else workload.problem().residual(y)
    except Exception as error:  # F is the user's, and may raise anything
        raise _Refused(f"{type(error).__name__}: {error}") from error


def _rowwise(workload: Workload, y: Tensor, expected: Tensor, row: int) -> tuple[bool, ...]:
    batch = workload.system.shape.batch
    candidates = [
        tensor.is_floating_point() and tensor.shape[: len(batch)] == batch for tensor in workload.theta
    ]
    if _unmoved(workload, y, expected, row, candidates):
        return tuple(candidates)
    return tuple(
        candidate and _unmoved(workload, y, expected, row, [i == k for i in range(len(candidates))])
        for k, candidate in enumerate(candidates)
    )


def _unmoved(workload: Workload, y: Tensor, expected: Tensor, row: int, spoiled: Sequence[bool]) -> bool:
    """Whether F of sample ``row`` is the same with NaN in the other rows of these tensors."""
    theta = tuple(
        _spoil(tensor, y.shape[0], row) if spoil else tensor
        for tensor, spoil in zip(workload.theta, spoiled, strict=True)
    )
    residual = _tried(replace(workload, theta=theta), _spoil(y, y.shape[0], row))
    return torch.equal(residual[row], expected)


def _spoil(tensor: Tensor, count: int, row: int) -> Tensor:
    rows = tensor.reshape(count, -1)
    spoiled = torch.full_like(rows, torch.nan)
    spoiled[row] = rows[row]
    return spoiled.reshape(tensor.shape)


def _agrees(workload: Workload, y: Tensor, reference: Tensor, row: int) -> bool:
    """Whether parts of one and of two samples have the residuals of the whole."""
    for size in (1, min(2, y.shape[0])):
        start = min(row, y.shape[0] - size)
        residual = _tried(workload.rows(start, start + size), y[start : start + size])
        tolerance = 1e3 * torch.finfo(y.dtype).eps
        gap = (residual[row - start] - reference[row]).abs()
        if not bool((gap <= tolerance * (1 + reference[row].abs())).all()):  # False for NaN
            return False
    return True


def _seconds_alone(workload: Workload, y: Tensor, row: int) -> float:
    if workload.system.parts:
        return min(_timed(workload.rows(row, row + 1), y[row : row + 1])[0] for _ in range(2))
    evaluate, seconds = _evaluation(workload, y, row), list[float]()
    with torch.no_grad():
        while len(seconds) < 2 or (len(seconds) < _TURNS and sum(seconds) < _CHEAP):
            began = time.perf_counter()
            try:
                evaluate()
            except Exception as error:  # as above
                raise _Refused(f"{type(error).__name__}: {error}") from error
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def _evaluation(workload: Workload, y: Tensor, row: int) -> Callable[[], Any]:
    """F of one sample as its solver would call it."""
    alone = workload.alone(row)
    if y.shape[-1] == 1 and isinstance(alone, Row) and (scalar := alone.scalar()) is not None:
        return partial(scalar, float(y[row]))
    return partial(alone("residual"), to_numpy(y[row]))
