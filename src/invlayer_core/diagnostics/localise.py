"""Where a wrong gradient is wrong: in which sample, and with respect to which input."""

from __future__ import annotations

from dataclasses import replace

import torch

from invlayer_core.diagnostics.derivatives import Derivatives
from invlayer_core.diagnostics.report import CheckRow
from invlayer_core.diagnostics.trial import inner

__all__ = ["localise"]

_INPUTS, _SAMPLES = 8, 64  # at most so many are told apart


def localise(row: CheckRow, found: Derivatives, k: int) -> CheckRow:
    """The row with its worst input and its worst sample, whose error replaces the one of the batch."""
    row = replace(row, detail=f"{row.detail}; {_worst_input(found, k)}")
    errors = _sample_errors(found, k)
    if not errors:
        return row
    sample = int(torch.tensor(errors).argmax())
    return replace(row, value=errors[sample], sample=sample, per_sample=tuple(errors))


def _worst_input(found: Derivatives, k: int) -> str:
    """Which input's gradient is off: the direction restricted to one input after the other."""
    trial, differences = found.trial, found.differences[k]
    assert found.pulled is not None
    cotangent, tangent = trial.directions.cotangents[k], trial.directions.tangents[k]
    step = float(differences.steps[differences.chosen])
    gaps = []
    for i in range(min(len(tangent), _INPUTS)):
        alone = [t if j == i else torch.zeros_like(t) for j, t in enumerate(tangent)]
        try:
            slope = (trial.forward_along(alone, step) - trial.forward_along(alone, -step)) / (2 * step)
        except Exception:  # outside the layer's domain
            continue
        by_vjp = inner([found.pulled[k][i]], [tangent[i]])[0]
        gaps.append((abs(by_vjp - float(slope @ cotangent)), trial.subject.inputs[i].name))
    return f"most with respect to {max(gaps)[1]}" if gaps else "the inputs could not be told apart"


def _sample_errors(found: Derivatives, k: int) -> list[float]:
    """The cotangent restricted to one sample after the other."""
    trial, differences = found.trial, found.differences[k]
    if not 1 < trial.layout.count <= _SAMPLES:
        return []
    alone = [trial.directions.cotangents[k] * (trial.layout.owner == i) for i in range(trial.layout.count)]
    errors = []
    for w, gradient in zip(alone, trial.pullbacks(trial.subject.values, alone), strict=True):
        slope, _, zero = differences.scalar(w)
        size = max(float((differences.slopes[differences.chosen] * w).abs().sum()), 1e-8 * zero, 1e-300)
        errors.append(abs(inner(gradient, trial.directions.tangents[k])[0] - slope) / size)
    return errors
