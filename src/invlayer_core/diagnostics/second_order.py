"""Double backward against finite differences of the gradient, and the symmetry of the Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from invlayer_core.diagnostics.comparison import RANK, in_words, judge, rounding_limit, unavailable
from invlayer_core.diagnostics.derivatives import Derivatives, curve_of
from invlayer_core.diagnostics.differences import Differences, take_differences
from invlayer_core.diagnostics.report import CheckRow, DifferenceCurve
from invlayer_core.diagnostics.subject import Outputs
from invlayer_core.diagnostics.trial import Trial, first_line, inner, pull_back

__all__ = ["check_second_order"]

_DIFFERENCES, _SYMMETRY = "double backward vs finite differences", "symmetry of the Hessian"


@final
@dataclass(frozen=True)
class _Hessian:
    """vᵀHu and uᵀHv, both ways of double backward, vᵀHv, and their sizes; H of ⟨w, f⟩."""

    mixed: float
    transposed: float
    square: float
    size: float
    silent: bool  # whether the gradient has no graph of its own


def check_second_order(found: Derivatives) -> tuple[list[CheckRow], list[DifferenceCurve]]:
    """Double backward against finite differences of the gradient, and the symmetry of the Hessian."""
    trial = found.trial
    if found.pulled is None:
        return _neither("the VJP is missing")
    u, v, w = trial.directions.tangents[0], trial.directions.tangents[1], trial.directions.cotangents[0]
    differences = take_differences(lambda t: _gradient_along(trial, t, u, v, w), trial.eps)
    if not differences.usable:
        return _neither("the gradient could not be evaluated beside the point")
    try:
        hessian = trial.subject.record(trial.subject.values, lambda out, leaves: _hessian(trial, out, leaves))
    except Exception as error:  # once_differentiable, a constant Jacobian, ...
        return _neither(f"double backward raises {first_line(error)}")
    # A second derivative counts as zero beside the gradient's own size.
    zero = 1e-8 * max(inner(found.pulled[0], u)[1], inner(found.pulled[0], v)[1]) + 1e-300
    rows = [_against_differences(trial, hessian, differences, zero), _symmetry(trial, hessian, zero)]
    return rows, _curves(hessian, differences, zero)


def _neither(why: str) -> tuple[list[CheckRow], list[DifferenceCurve]]:
    return [unavailable(_DIFFERENCES, why), unavailable(_SYMMETRY, why)], []


def _compare(
    hessian: _Hessian, differences: Differences, zero: float
) -> Iterator[tuple[Tensor, float, float, float]]:
    """For uᵀHv and vᵀHv: which one, by double backward, by differences, and their size."""
    for unit, exact in zip(torch.eye(2, dtype=torch.float64), (hessian.mixed, hessian.square), strict=True):
        slope, _, size = differences.scalar(unit)
        yield unit, exact, slope, max(size, zero, abs(exact))


def _against_differences(trial: Trial, hessian: _Hessian, differences: Differences, zero: float) -> CheckRow:
    results = []
    for unit, exact, slope, size in _compare(hessian, differences, zero):
        _, open_, own = differences.scalar(unit)
        gap, open_ = abs(exact - slope) / size, open_ * own / size
        results.append((*judge(gap, open_, trial, order=2), gap, open_))
    verdict, limit, gap, open_ = max(results, key=lambda result: (RANK[result[0]], result[2]))
    row = CheckRow(_DIFFERENCES, verdict, gap, limit)
    if hessian.silent and verdict == "wrong":
        return replace(row, detail="the gradient carries no graph: the second derivative is silently zero")
    return in_words(row, open_, "∇⟨∇⟨w, f⟩, v⟩ and differences of ∇⟨w, f⟩")


def _symmetry(trial: Trial, hessian: _Hessian, zero: float) -> CheckRow:
    gap = abs(hessian.mixed - hessian.transposed) / max(hessian.size, zero)
    limit = rounding_limit(trial)
    return CheckRow(_SYMMETRY, "ok" if gap <= limit else "wrong", gap, limit, "uᵀ(Hv) and vᵀ(Hu)")


def _curves(hessian: _Hessian, differences: Differences, zero: float) -> list[DifferenceCurve]:
    compared = enumerate(_compare(hessian, differences, zero))
    return [curve_of(2, k, differences, unit, exact, size) for k, (unit, exact, _, size) in compared]


def _gradient_along(trial: Trial, step: float, u: Sequence[Tensor], v: Sequence[Tensor], w: Tensor) -> Tensor:
    """⟨∇⟨w, f⟩, u⟩ and ⟨∇⟨w, f⟩, v⟩ at a step along v."""
    (gradient,) = trial.pullbacks(trial.subject.moved(v, step), [w])
    return torch.tensor([inner(gradient, u)[0], inner(gradient, v)[0]], dtype=torch.float64)


def _hessian(trial: Trial, outputs: Outputs, leaves: list[Tensor]) -> _Hessian:
    u, v = trial.directions.tangents[:2]
    gradient = pull_back(trial.select(outputs), leaves, trial.directions.cotangents[0], create_graph=True)
    if not any(part.requires_grad for part in gradient):
        return _Hessian(0.0, 0.0, 0.0, 0.0, silent=True)
    times_v, times_u = _hessian_times(gradient, leaves, v), _hessian_times(gradient, leaves, u)
    mixed, size = inner(times_v, u)
    transposed, other = inner(times_u, v)
    return _Hessian(mixed, transposed, inner(times_v, v)[0], max(size, other), silent=False)


def _hessian_times(gradient: list[Tensor], leaves: list[Tensor], tangent: Sequence[Tensor]) -> list[Tensor]:
    parts = [(part, t) for part, t in zip(gradient, tangent, strict=True) if part.requires_grad]
    grads = torch.autograd.grad(
        [part for part, _ in parts], leaves, [t for _, t in parts], allow_unused=True, retain_graph=True
    )
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
