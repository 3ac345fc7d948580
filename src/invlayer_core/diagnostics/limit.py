"""One sentence: which of the things that were measured limits the gradient, or the check of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from invlayer_core.diagnostics.report import CheckRow
from invlayer_core.diagnostics.trial import Trial

__all__ = ["limiting_factor"]

VJP, JVP, BOTH = "VJP vs finite differences", "JVP vs finite differences", "VJP vs JVP"
SECOND, SYMMETRY = "double backward vs finite differences", "symmetry of the Hessian"
COUPLING, CONDITIONING = "batch coupling", "conditioning of J"


@final
@dataclass(frozen=True)
class _Evidence:
    trial: Trial
    rows: dict[str, CheckRow]
    uncertainty: float  # of finite differences

    def __getitem__(self, name: str) -> CheckRow:
        return self.rows[name]

    def verdict(self, name: str) -> str:
        return self.rows[name].verdict


def limiting_factor(trial: Trial, rows: Sequence[CheckRow], uncertainty: float) -> str:
    """The first cause that applies: what spoils everything after it comes first."""
    evidence = _Evidence(trial, {row.name: row for row in rows}, uncertainty)
    causes: list[Callable[[_Evidence], str]] = [
        _nondeterministic, _failed, _singular, _raises, _detached, _wrong_first, _wrong_forward_mode,
        _wrong_second, _ill_conditioned, _coupled, _noisy, _uncertain, _nothing,
    ]  # fmt: skip
    return next(sentence for cause in causes if (sentence := cause(evidence)))


def _where(row: CheckRow) -> str:
    return "" if row.sample is None else f" in sample {row.sample}"


def _amount(value: float | None) -> str:
    value = value or 0.0
    if value >= 10:
        return f"a factor of {value:.1g}"
    if value >= 0.1:
        return f"{100 * value:.0f} %"
    return f"{100 * value:.2g} %" if value >= 1e-3 else f"{value:.0e}"


def _nondeterministic(found: _Evidence) -> str:
    row = found["determinism"]
    if row.verdict == "ok":
        return ""
    if row.value is None:
        return f"the forward is not finite: {row.detail}."
    return (
        f"the forward is not deterministic: the same input twice differs by {row.value:.0e}{_where(row)}, "
        "and no derivative can be checked beyond that. Dropout, random starts, or a start kept between calls?"
    )


def _failed(found: _Evidence) -> str:
    if found.verdict("residual") != "wrong":
        return ""
    return (
        f"the solver fails: {found['residual'].detail}. Start closer (y0=), or give the solver more room "
        "(options=)."
    )


def _singular(found: _Evidence) -> str:
    if found.verdict(CONDITIONING) != "wrong":
        return ""
    return (
        f"{found[CONDITIONING].detail}: the solution is no differentiable function of the inputs there. "
        "adjoint=inv.adjoints.Implicit(singular=...) decides what such a sample gives."
    )


def _raises(found: _Evidence) -> str:
    row = found[VJP]
    if not row.detail.startswith("the backward raises"):
        return ""
    if found.verdict(COUPLING) == "suspicious":
        return f"samples are coupled, so that there is no Jacobian per sample: {row.detail}"
    return row.detail


def _detached(found: _Evidence) -> str:
    if found.trial.carries or found.verdict(VJP) != "wrong":
        return ""
    return (
        "no output carries a gradient although its values change with the inputs: something on the way "
        "detaches (.detach(), .item(), NumPy, no_grad). Wrap the solver with inv.implicit_function."
    )


def _wrong_first(found: _Evidence) -> str:
    row = found[VJP]
    if row.verdict != "wrong":
        return ""
    what = row.detail.split("; ")[-1]
    start = f"the backward differs from finite differences by {_amount(row.value)}{_where(row)}, {what}"
    if found.verdict(JVP) in ("ok", "suspicious"):
        return f"{start}, while forward mode agrees with them: the VJP rule is wrong."
    if not found.trial.systems:
        return f"{start}: a derivative rule on the way is wrong."
    if found.trial.systems[0].residual is None:
        return f"{start}: jacobian= is not the Jacobian of the inverse of what the solver returns."
    together = " VJP and JVP agree;" if found.verdict(BOTH) == "ok" else ""
    return (
        f"{start}:{together} the conditions do not describe what the solver returns. Do they use every "
        "input that the solver uses, and none through .detach()?"
    )


def _wrong_forward_mode(found: _Evidence) -> str:
    row = found[JVP]
    if row.verdict == "wrong":
        return (
            f"forward mode differs from finite differences by {_amount(row.value)}{_where(row)}, while the "
            "backward agrees with them: the JVP rule is wrong."
        )
    if found.verdict(BOTH) == "wrong":
        return f"VJP and JVP differ by {_amount(found[BOTH].value)}: they are not each other's transpose."
    return ""


def _wrong_second(found: _Evidence) -> str:
    row = found[SECOND]
    if row.verdict == "wrong":
        silent = "silently" in row.detail
        why = (
            row.detail if silent else "the backward takes something that depends on the inputs for a constant"
        )
        return (
            "first derivatives are right, but double backward differs from finite differences of the "
            f"gradient by {_amount(row.value)}: {why}."
        )
    if found.verdict(SYMMETRY) == "wrong":
        return f"the Hessian of double backward is not symmetric, by {_amount(found[SYMMETRY].value)}."
    return ""


def _ill_conditioned(found: _Evidence) -> str:
    row = found[CONDITIONING]
    if row.verdict != "suspicious":
        return ""
    return (
        f"J is ill-conditioned{_where(row)} ({row.value:.0e}): rounding alone makes an error of up to "
        f"{found.trial.eps * (row.value or 0.0):.0e} in the gradient."
    )


def _coupled(found: _Evidence) -> str:
    row = found[COUPLING]
    if row.verdict != "suspicious":
        return ""
    return (
        f"samples are coupled: {row.detail} (BatchNorm in train mode, a mean over the batch?). There is no "
        "gradient per sample then."
    )


def _noisy(found: _Evidence) -> str:
    noise, residual = found["forward noise"], found["residual"]
    parts = []
    if noise.verdict == "suspicious":
        parts.append(f"forward noise {noise.value:.0e}")
    if residual.verdict == "suspicious":
        parts.append(f"y is off by {found.trial.solver_error:.0e} of itself")
    if not parts:
        return ""
    implicit = bool(found.trial.systems)
    whose = "the solver's tolerance" if implicit else "the noise of the forward"
    remedy = "; polish=2 would lower it, or a tighter tolerance of the solver." if implicit else "."
    return f"the gradient and finite differences are limited by {whose}: {', '.join(parts)}{remedy}"


def _uncertain(found: _Evidence) -> str:
    doubtful = [row for row in found.rows.values() if row.verdict == "suspicious"]
    return f"{doubtful[0].name}: {doubtful[0].detail}." if doubtful else ""


def _nothing(found: _Evidence) -> str:
    row, noise = found[VJP], found["forward noise"]
    if row.verdict == "not available":
        return f"nothing could be compared: {row.detail}."
    start = f"nothing stands out; the gradient agrees with finite differences to {row.value:.0e}"
    if (row.value or 0.0) <= 10 * found.uncertainty:
        start += f", and forward noise of {noise.value:.0e} lets them show no more"
    elif found.trial.systems:
        start += ", as far as the solver's own tolerance allows (polish=2 would tell)"
    if found.verdict(SECOND) == "not available":
        return f"{start}. There is no second derivative: {found[SECOND].detail}."
    return f"{start}."
