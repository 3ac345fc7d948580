"""First derivatives along the fixed directions: by finite differences, by reverse and by forward mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from invlayer_core.diagnostics.differences import Differences, take_differences
from invlayer_core.diagnostics.report import DifferenceCurve
from invlayer_core.diagnostics.trial import Trial, inner

__all__ = ["Derivatives", "curve_of", "first_order_curves"]


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
    def by_vjp(self) -> list[float]:
        """⟨Jᵀw, v⟩ for every direction; zeros if no output carries a gradient."""
        if self.pulled is None:
            return [0.0] * len(self.differences)
        tangents = self.trial.directions.tangents
        return [inner(gradient, v)[0] for gradient, v in zip(self.pulled, tangents, strict=True)]

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
            open_.append(found.scalar(cotangent)[1])
        return max(open_)


def first_order_curves(found: Derivatives) -> list[DifferenceCurve]:
    """The error of ⟨w, D v⟩ over the step, against the VJP (or the chosen difference, if there is none)."""
    curves = []
    lines = zip(found.differences, found.trial.directions.cotangents, found.by_vjp, strict=True)
    for k, (differences, w, by_vjp) in enumerate(lines):
        slope, _, size = differences.scalar(w)
        curves.append(curve_of(1, k, differences, w, slope if found.pulled is None else by_vjp, size))
    return curves


def curve_of(
    order: int, k: int, differences: Differences, cotangent: Tensor, exact: float, size: float
) -> DifferenceCurve:
    """The errors of ⟨cotangent, D(h)⟩ against ``exact``, in units of ``size``."""
    series, floor, own = differences.along(cotangent)
    open_ = differences.scalar(cotangent)[1] * float(own) / size
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
