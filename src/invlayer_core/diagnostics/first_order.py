"""VJP, JVP and finite differences of the layer against each other; and the noise that limits them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from invlayer_core.diagnostics.comparison import RANK, in_words, judge, rounding_limit, unavailable
from invlayer_core.diagnostics.derivatives import Derivatives
from invlayer_core.diagnostics.localise import localise
from invlayer_core.diagnostics.report import CheckRow
from invlayer_core.diagnostics.trial import first_line, inner

__all__ = ["check_first_order", "check_noise"]

_NOT_BESIDE = "the layer could not be evaluated beside the point"


def check_noise(found: Derivatives) -> CheckRow:
    """The forward's noise, and the finite differences it allows."""
    name, limit = "forward noise", found.trial.accurate
    if not math.isfinite(found.noise):
        return unavailable(name, _NOT_BESIDE)
    steps = [float(d.steps[d.chosen]) for d in found.differences]
    failures = sum(d.failures for d in found.differences)
    detail = (
        f"of y; finite differences with steps of {min(steps):.0e} leave {found.uncertainty:.0e} open"
        + (f"; {failures} evaluations beside the point raised" if failures else "")
        + ("" if all(d.noise.agreed for d in found.differences) else "; an upper bound")
    )
    noisy = found.noise > limit
    return CheckRow(name, "suspicious" if noisy else "ok", found.noise, limit, detail)


def check_first_order(found: Derivatives) -> list[CheckRow]:
    """VJP and JVP against each other and against finite differences."""
    return [_vjp_against_jvp(found), _vjp_against_differences(found), _jvp_against_differences(found)]


def _vjp_against_jvp(found: Derivatives) -> CheckRow:
    name, trial = "VJP vs JVP", found.trial
    if found.pulled is None or found.pushed is None:
        missing = "the VJP" if found.pulled is None else "the JVP"
        return unavailable(name, f"{missing} is missing")
    gaps = []
    lines = zip(
        found.pulled, found.pushed, trial.directions.tangents, trial.directions.cotangents, strict=True
    )
    for pulled, pushed, tangent, cotangent in lines:
        by_vjp, size = inner(pulled, tangent)
        products = cotangent * pushed
        zero = 1e-8 * float((trial.value * cotangent).norm()) + 1e-300
        gaps.append(abs(by_vjp - float(products.sum())) / max(size, float(products.norm()), zero))
    limit, gap = rounding_limit(trial), float(torch.tensor(gaps).max())  # NaN if one is
    return CheckRow(name, "ok" if gap <= limit else "wrong", gap, limit, "⟨Jᵀw, v⟩ and ⟨w, Jv⟩")


def _vjp_against_differences(found: Derivatives) -> CheckRow:
    name, trial = "VJP vs finite differences", found.trial
    if "vjp" in found.errors:
        return CheckRow(name, "wrong", detail=f"the backward raises {first_line(found.errors['vjp'])}")
    if not found.comparable:
        return unavailable(name, _NOT_BESIDE)
    results = []
    lines = zip(found.differences, trial.directions.cotangents, found.by_vjp, strict=True)
    for k, (differences, cotangent, by_vjp) in enumerate(lines):
        slope, open_, size = differences.scalar(cotangent)
        error = abs(by_vjp - slope) / size
        results.append((*judge(error, open_, trial), error, open_, k))
    verdict, limit, error, open_, k = max(
        results, key=lambda result: (RANK[result[0]], result[2] / result[1])
    )
    row = in_words(CheckRow(name, verdict, error, limit), open_, "⟨Jᵀw, v⟩ and ⟨w, D v⟩")
    if found.pulled is None:
        detail = "no output carries a gradient" + (", though values change" if verdict == "wrong" else "")
        return replace(row, detail=detail)
    return localise(row, found, k) if verdict == "wrong" else row


def _jvp_against_differences(found: Derivatives) -> CheckRow:
    name, trial = "JVP vs finite differences", found.trial
    if found.pushed is None:
        return unavailable(name, f"forward mode raises {first_line(found.errors['jvp'])}")
    if not found.comparable:
        return unavailable(name, _NOT_BESIDE)
    layout = trial.layout
    worst, open_ = torch.zeros(max(1, layout.count)), torch.zeros(max(1, layout.count))
    for differences, pushed in zip(found.differences, found.pushed, strict=True):
        slope = differences.slopes[differences.chosen]
        size = layout.per_sample(slope.abs()) + 1e-8 * layout.per_sample(trial.value.abs()) + 1e-300
        worst = torch.maximum(worst, layout.per_sample((pushed - slope).abs()) / size)
        open_ = torch.maximum(open_, layout.per_sample(differences.uncertainty) / size)
    verdicts = [judge(float(e), float(o), trial) for e, o in zip(worst, open_, strict=True)]
    i = max(range(len(verdicts)), key=lambda i: (RANK[verdicts[i][0]], float(worst[i])))
    verdict, limit = verdicts[i]
    row = CheckRow(name, verdict, float(worst[i]), limit)
    if layout.batch:
        row = replace(row, sample=i, per_sample=tuple(worst.tolist()))
    return in_words(row, float(open_[i]), "J v and D v, entry by entry")
