"""Checks of first and second derivatives: against each other, and against finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from invlayer_core.diagnostics.differences import Differences, take_differences
from invlayer_core.diagnostics.report import CheckRow, DifferenceCurve, RowVerdict
from invlayer_core.diagnostics.subject import Outputs
from invlayer_core.diagnostics.trial import Trial, first_line, inner, pull_back

__all__ = ["Derivatives", "check_first_order", "check_noise", "check_second_order"]

_LITTLE = 1e-2  # a comparison that leaves more than this open proves little
_UNSETTLED = 0.1  # and from here on it proves nothing
_SOLVER = 100.0  # by how much more than y itself each derivative may be off


@final
@dataclass(frozen=True)
class Derivatives:
    """First derivatives along the trial's directions; what raised is None, with the reason in ``errors``."""

    trial: Trial
    differences: tuple[Differences, ...]
    pulled: list[list[Tensor]] | None
    pushed: list[Tensor] | None
    errors: dict[str, BaseException] = field(default_factory=dict)

    @classmethod
    def take(cls, trial: Trial) -> Derivatives:
        """All of them."""
        differences = tuple(
            take_differences(lambda t, v=tangent: trial.forward_along(v, t), trial.eps)  # type: ignore[misc]
            for tangent in trial.directions.tangents
        )
        errors: dict[str, BaseException] = {}
        pulled: list[list[Tensor]] | None = None
        pushed: list[Tensor] | None = None
        if trial.carries:
            try:
                pulled = trial.pullbacks(trial.subject.values, trial.directions.cotangents)
            except Exception as error:  # whatever it is, it is the finding
                errors["vjp"] = error
        try:
            pushed = [trial.pushforward(tangent) for tangent in trial.directions.tangents]
        except Exception as error:
            errors["jvp"] = error
        return cls(trial, differences, pulled, pushed, errors)

    @property
    def comparable(self) -> bool:
        """Whether there are finite differences to compare with."""
        return all(differences.usable for differences in self.differences)

    @property
    def noise(self) -> float:
        """The noise of the forward, relative to its values: the root mean square over entries."""
        levels = [
            float(found.noise.deviation.norm() / found.value.norm().clamp_min(1e-300))
            for found in self.differences
        ]
        return max(levels)

    @property
    def uncertainty(self) -> float:
        """What the finite differences leave open, relatively."""
        open_ = []
        for found, cotangent in zip(self.differences, self.trial.directions.cotangents, strict=True):
            open_.append(_scalar(found, cotangent)[1])
        return max(open_)


def check_noise(found: Derivatives) -> CheckRow:
    """The forward's noise, and the finite differences it allows."""
    name, limit = "forward noise", found.trial.accurate
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
        return CheckRow(name, "not available", detail=f"{missing} is missing")
    gaps = []
    lines = zip(
        found.pulled, found.pushed, trial.directions.tangents, trial.directions.cotangents, strict=True
    )
    for pulled, pushed, tangent, cotangent in lines:
        by_vjp, size = inner(pulled, tangent)
        products = cotangent * pushed
        size = max(size, float(products.norm()), _zero_size(trial, cotangent))
        gaps.append(abs(by_vjp - float(products.sum())) / size)
    limit = rounding_limit(trial)
    verdict: RowVerdict = "ok" if max(gaps) <= limit else "wrong"
    return CheckRow(name, verdict, max(gaps), limit, "⟨Jᵀw, v⟩ and ⟨w, Jv⟩")


def rounding_limit(trial: Trial) -> float:
    """What rounding leaves open between two exact rules."""
    return min(1e3 * trial.eps * trial.condition, 1e-3) if trial.eps < 1e-9 else 1e3 * trial.eps


def _zero_size(trial: Trial, cotangent: Tensor) -> float:
    return 1e-8 * float((trial.value * cotangent).norm()) + 1e-300


def _scalar(differences: Differences, cotangent: Tensor) -> tuple[float, float, float]:
    """⟨w, D⟩ at the chosen step, its relative uncertainty, and its size."""
    series, floor, size = differences.along(cotangent)
    k = differences.chosen
    near = series[max(k - 1, 0) : k + 2]
    gap = float((near - series[k]).abs().nan_to_num(0.0).max())
    return float(series[k]), max(gap, float(floor[k])) / float(size), float(size)


def judge(error: float, open_: float, trial: Trial, order: int = 1) -> tuple[RowVerdict, float]:
    """A verdict on a relative error where ``open_`` cannot be told from zero; and the tolerance.

    An error is only wrong if neither the differences, nor the solver's distance from the root, nor rounding
    through an ill-conditioned J can explain it.
    """
    limit = max(trial.close, 2 * open_)
    if error <= limit:
        return ("suspicious" if limit > max(_LITTLE, trial.close) else "ok"), limit
    explained = max(_SOLVER**order * trial.solver_error, 10 * trial.eps * trial.condition)
    if open_ > _UNSETTLED or error <= explained:
        return "suspicious", limit
    return "wrong", limit


def _in_words(row: CheckRow, open_: float, agrees: str) -> CheckRow:
    """A comparison's detail: what was compared, or why it says little."""
    if row.verdict == "ok":
        return replace(row, detail=agrees)
    if open_ > _LITTLE / 2:
        return replace(row, detail=f"finite differences do not settle: they leave {open_:.0e} open")
    if row.verdict == "suspicious":
        return replace(
            row, detail=f"{agrees}: no more than the solver's error, or ill-conditioning, explains"
        )
    return replace(row, detail=f"{agrees} differ")


def _vjp_against_differences(found: Derivatives) -> CheckRow:
    name, trial = "VJP vs finite differences", found.trial
    if "vjp" in found.errors:
        return CheckRow(name, "wrong", detail=f"the backward raises {first_line(found.errors['vjp'])}")
    if not found.comparable:
        return CheckRow(name, "not available", detail=_NOT_BESIDE)
    results = []
    for k, (differences, cotangent) in enumerate(
        zip(found.differences, trial.directions.cotangents, strict=True)
    ):
        slope, open_, size = _scalar(differences, cotangent)
        by_vjp = 0.0 if found.pulled is None else inner(found.pulled[k], trial.directions.tangents[k])[0]
        error = abs(by_vjp - slope) / size
        results.append((*judge(error, open_, trial), error, open_, k))
    verdict, limit, error, open_, k = max(
        results, key=lambda result: (_RANK[result[0]], result[2] / result[1])
    )
    row = CheckRow(name, verdict, error, limit)
    if found.pulled is None:
        detail = "no output carries a gradient" + (", though values change" if verdict == "wrong" else "")
        return replace(row, detail=detail)
    row = _in_words(row, open_, "⟨Jᵀw, v⟩ and ⟨w, D v⟩")
    if verdict != "wrong":
        return row
    return replace(row, detail=f"{row.detail}; {_worst_input(found, k)}", sample=_worst_sample(found, k))


_NOT_BESIDE = "the layer could not be evaluated beside the point"
_RANK: dict[RowVerdict, int] = {"ok": 0, "suspicious": 1, "wrong": 2, "not available": -1}


def _worst_input(found: Derivatives, k: int) -> str:
    """Which input's gradient is off: the direction restricted to one input after the other."""
    trial, differences = found.trial, found.differences[k]
    assert found.pulled is not None
    cotangent, tangent = trial.directions.cotangents[k], trial.directions.tangents[k]
    step = float(differences.steps[differences.chosen])
    gaps = []
    for i in range(min(len(tangent), 8)):
        alone = [t if j == i else torch.zeros_like(t) for j, t in enumerate(tangent)]
        try:
            slope = (trial.forward_along(alone, step) - trial.forward_along(alone, -step)) / (2 * step)
        except Exception:  # outside the layer's domain
            continue
        by_vjp = inner([found.pulled[k][i]], [tangent[i]])[0]
        gaps.append((abs(by_vjp - float(slope @ cotangent)), trial.subject.inputs[i].name))
    return f"most with respect to {max(gaps)[1]}" if gaps else "the inputs could not be told apart"


def _worst_sample(found: Derivatives, k: int) -> int | None:
    """Which sample's gradient is off: the cotangent restricted to one sample after the other."""
    trial, differences = found.trial, found.differences[k]
    count = trial.layout.count
    if not 1 < count <= 64:
        return None
    cotangent, tangent = trial.directions.cotangents[k], trial.directions.tangents[k]
    alone = [cotangent * (trial.layout.owner == i) for i in range(count)]
    pulled = trial.pullbacks(trial.subject.values, alone)
    gaps = []
    for w, gradient in zip(alone, pulled, strict=True):
        slope, _, size = _scalar(differences, w)
        gaps.append(abs(inner(gradient, tangent)[0] - slope) / size)
    return int(torch.tensor(gaps).argmax())


def _jvp_against_differences(found: Derivatives) -> CheckRow:
    name, trial = "JVP vs finite differences", found.trial
    if found.pushed is None:
        return CheckRow(
            name, "not available", detail=f"forward mode raises {first_line(found.errors['jvp'])}"
        )
    if not found.comparable:
        return CheckRow(name, "not available", detail=_NOT_BESIDE)
    layout = trial.layout
    worst, open_ = torch.zeros(max(1, layout.count)), torch.zeros(max(1, layout.count))
    for differences, pushed in zip(found.differences, found.pushed, strict=True):
        slope = differences.slopes[differences.chosen]
        size = layout.per_sample(slope.abs()) + 1e-8 * layout.per_sample(trial.value.abs()) + 1e-300
        worst = torch.maximum(worst, layout.per_sample((pushed - slope).abs()) / size)
        open_ = torch.maximum(open_, layout.per_sample(differences.uncertainty) / size)
    verdicts = [judge(float(e), float(o), trial) for e, o in zip(worst, open_, strict=True)]
    i = max(range(len(verdicts)), key=lambda i: (_RANK[verdicts[i][0]], float(worst[i])))
    row = CheckRow(name, *_swap(verdicts[i], float(worst[i])))
    if layout.batch:
        row = replace(row, sample=i, per_sample=tuple(worst.tolist()))
    return _in_words(row, float(open_[i]), "J v and D v, entry by entry")


def _swap(verdict: tuple[RowVerdict, float], error: float) -> tuple[RowVerdict, float, float]:
    """Verdict, value and tolerance, in the order of a row."""
    return verdict[0], error, verdict[1]


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
    names = ("double backward vs finite differences", "symmetry of the Hessian")
    trial = found.trial
    if found.pulled is None:
        rows = [CheckRow(name, "not available", detail="the VJP is missing") for name in names]
        return rows, []
    u, v, w = trial.directions.tangents[0], trial.directions.tangents[1], trial.directions.cotangents[0]
    differences = take_differences(lambda t: _gradient_along(trial, t, u, v, w), trial.eps)
    if not differences.usable:
        reason = "the gradient could not be evaluated beside the point"
        return [CheckRow(name, "not available", detail=reason) for name in names], []
    try:
        hessian = trial.subject.record(trial.subject.values, lambda out, leaves: _hessian(trial, out, leaves))
    except Exception as error:  # once_differentiable, a constant Jacobian, ...
        reason = f"double backward raises {first_line(error)}"
        return [CheckRow(name, "not available", detail=reason) for name in names], []
    # A second derivative counts as zero beside the gradient's own size.
    zero = 1e-8 * max(inner(found.pulled[0], u)[1], inner(found.pulled[0], v)[1]) + 1e-300
    results, curves = [], []
    for k, exact in enumerate((hessian.mixed, hessian.square)):
        unit = torch.eye(2, dtype=torch.float64)[k]
        slope, open_, size = _scalar(differences, unit)
        size_here = max(size, zero, abs(exact))
        open_ *= size / size_here
        gap = abs(exact - slope) / size_here
        results.append((*judge(gap, open_, trial, order=2), gap, open_))
        curves.append(_curve(2, k, differences, unit, exact, size_here))
    verdict, limit, gap, open_ = max(results, key=lambda result: (_RANK[result[0]], result[2]))
    row = _in_words(
        CheckRow(names[0], verdict, gap, limit), open_, "∇⟨∇⟨w, f⟩, v⟩ and differences of ∇⟨w, f⟩"
    )
    if hessian.silent and verdict == "wrong":
        row = replace(row, detail="the gradient carries no graph: the second derivative is silently zero")
    rows = [row]
    gap = abs(hessian.mixed - hessian.transposed) / max(hessian.size, zero)
    symmetric = rounding_limit(trial)
    rows.append(
        CheckRow(names[1], "ok" if gap <= symmetric else "wrong", gap, symmetric, "uᵀ(Hv) and vᵀ(Hu)")
    )
    return rows, curves


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


def first_order_curves(found: Derivatives) -> list[DifferenceCurve]:
    """The error of ⟨w, D v⟩ over the step, against the VJP (or the chosen difference, if there is none)."""
    curves = []
    for k, (differences, w) in enumerate(
        zip(found.differences, found.trial.directions.cotangents, strict=True)
    ):
        slope, _, size = _scalar(differences, w)
        exact = (
            slope if found.pulled is None else inner(found.pulled[k], found.trial.directions.tangents[k])[0]
        )
        curves.append(_curve(1, k, differences, w, exact, size))
    return curves


def _curve(
    order: int, k: int, differences: Differences, cotangent: Tensor, exact: float, size: float
) -> DifferenceCurve:
    series, floor, own = differences.along(cotangent)
    open_ = _scalar(differences, cotangent)[1] * float(own) / size
    return DifferenceCurve(
        order=order,
        direction=k,
        steps=tuple(differences.steps.tolist()),
        errors=tuple(((series - exact).abs() / size).tolist()),
        noise=tuple((floor / size).tolist()),
        chosen=differences.chosen,
        predicted=differences.predicted,
        uncertainty=open_,
    )
