"""The conditions and their Jacobian at one sample, in NumPy: what the Newton steps are made of."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import numpy as np

from invlayer_casadi.expressions.buffers import ThreadFunctions
from invlayer_casadi.nlp.conditions import Activity
from invlayer_casadi.nlp.factor import KKTMatrix, KKTPattern
from invlayer_casadi.nlp.program import NlpProgram

__all__ = ["Evaluation", "SampleData", "SamplePoint", "SecondDerivatives"]


@final
class SampleData(NamedTuple):
    """What the conditions of one sample depend on besides z."""

    p: np.ndarray
    lower: np.ndarray  # of (g, x)
    upper: np.ndarray


@final
class Evaluation(NamedTuple):
    """F at one z, with what its Jacobian needs of it."""

    residual: np.ndarray
    value: np.ndarray  # (g, x)
    scale: float
    size: float  # ‖F‖∞, its first rows in the units of the others


@final
class SecondDerivatives(NamedTuple):
    """Nonzeros of H and ∂g."""

    hessian: np.ndarray
    jacobian: np.ndarray


@final
class SamplePoint:
    """F and ∂F/∂z of one sample; as in ``conditions.py``, where the formulas are."""

    def __init__(self, program: NlpProgram, activity: Activity) -> None:
        self.program, self.activity = program, activity
        self.pattern = KKTPattern(program)
        self._first = ThreadFunctions(program.sparse_first.function)
        self._second = ThreadFunctions(program.sparse_second.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return SamplePoint, (self.program, self.activity)

    def evaluate(self, z: np.ndarray, data: SampleData) -> Evaluation:
        """F(z), with exact rows."""
        n, m = self.program.unknowns, self.program.constraints
        x, gradient, g = z[:n].copy(), np.zeros(n), np.zeros(m)
        self._first.buffer(1)([x, data.p, z[n : n + m].copy()], [gradient, g])
        value, scale = np.concatenate([g, x]), _scale(z[n:], self._curvature(z, data, gradient))
        with np.errstate(invalid="ignore"):
            rows = value - np.clip(value + scale * z[n:], data.lower, data.upper)
        fixed = data.lower == data.upper
        rows[fixed] = (value - data.lower)[fixed]
        lengths = float(np.abs(rows).max(initial=0.0))
        if self.activity == "exact":
            inactive = (value + scale * z[n:] <= data.upper) & (value + scale * z[n:] >= data.lower) & ~fixed
            rows[inactive] = -z[n:][inactive]
        stationarity = gradient + z[n + m :]
        size = max(scale * float(np.abs(stationarity).max(initial=0.0)), lengths)
        if np.isnan(stationarity).any():  # which max() may pass over
            size = np.nan
        return Evaluation(np.concatenate([stationarity, rows]), value, scale, size)

    def second(self, z: np.ndarray, data: SampleData) -> SecondDerivatives:
        """H and ∂g at z."""
        n, m = self.program.unknowns, self.program.constraints
        function = self.program.sparse_second.function
        hessian, jacobian = np.zeros(function.nnz_out(0)), np.zeros(function.nnz_out(1))
        self._second.buffer(1)([z[:n].copy(), data.p, z[n : n + m].copy()], [hessian, jacobian])
        return SecondDerivatives(hessian, jacobian)

    def _curvature(self, z: np.ndarray, data: SampleData, gradient: np.ndarray) -> float:
        """As ``NlpConditions.curvature`` has it."""
        n, m = self.program.unknowns, self.program.constraints
        x, beside = z[:n], np.zeros(n)
        step = np.finfo(np.float64).eps ** 0.25 * (1.0 + np.abs(x)) * np.sin(1.0 + 2.4 * np.arange(n))
        self._first.buffer(1)([x + step, data.p, z[n : n + m].copy()], [beside, np.zeros(m)])
        with np.errstate(invalid="ignore"):
            curvature = float(np.abs(beside - gradient).max(initial=0.0) / np.abs(step).max(initial=1e-300))
        return curvature if np.isfinite(curvature) else 0.0

    def matrix(
        self,
        z: np.ndarray,
        data: SampleData,
        at: Evaluation,
        second: SecondDerivatives,
        nearby: KKTMatrix | None = None,
    ) -> KKTMatrix:
        """∂F/∂z, not factorised yet."""
        n, unit = self.program.unknowns, 1.0 if self.activity == "exact" else at.scale
        weights = _weights(at.value, at.scale * z[n:], data.lower, data.upper, self.activity)
        return KKTMatrix(self.pattern, second.hessian, second.jacobian, weights, unit, nearby)


def _scale(multipliers: np.ndarray, curvature: float) -> float:
    """As ``scale_of`` has it."""
    largest = max(float(np.abs(multipliers).max(initial=0.0)), curvature)
    return 1.0 / largest if 0 < largest < np.inf else 1.0


def _weights(
    value: np.ndarray, scaled: np.ndarray, lower: np.ndarray, upper: np.ndarray, activity: Activity
) -> np.ndarray:
    """θ of every row, as ``activity_of`` has it."""
    above, below = value + scaled > upper, value + scaled < lower
    if activity == "exact":
        weight = (above | below).astype(np.float64)
    else:
        on_upper = above | (~below & (scaled > 0))
        slack = np.maximum(np.where(on_upper, upper - value, value - lower), 0.0)
        total = slack + np.abs(scaled)
        finite = np.isfinite(slack) & (total > 0)
        weight = np.divide(np.abs(scaled), total, out=np.zeros_like(total), where=finite)
    weight[(lower == upper) | np.isnan(value)] = 1.0
    return weight
