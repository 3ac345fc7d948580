"""A report as a figure, by matplotlib."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from invlayer_core.diagnostics.optional import import_optional
from invlayer_core.diagnostics.report import CheckRow, DifferenceCurve, LayerReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_report"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe & Ito: told apart by colour-blind readers, too
_SMALLEST = 1e-17  # where zero is drawn
_TITLE = 140  # characters over two panels
_GREY, _LIGHT = "#666666", "#dddddd"
_WORST, _OTHERS = "#D55E00", "#56B4E9"


def plot_report(report: LayerReport) -> Figure:
    """Errors of finite differences over the step; residual and condition per sample, where there are."""
    import_optional("matplotlib", "report.plot()")
    figure_type = import_optional("matplotlib.figure", "report.plot()").Figure
    curves = {order: [c for c in report.curves if c.order == order] for order in (1, 2)}
    panels: list[Any] = [curves[order] for order in (1, 2) if curves[order]]
    panels += [row for row in report.rows if row.name in ("residual", "conditioning of J") and row.per_sample]
    columns = max(1, min(2, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure: Figure = figure_type(figsize=(5.2 * columns, 3.7 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, axis in zip(panels, axes, strict=False):
        _bars(axis, panel) if isinstance(panel, CheckRow) else _curves(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(_title(report, columns > 1), fontsize=9, x=0.01, ha="left")
    return figure


def _title(report: LayerReport, wide: bool) -> str:
    return "\n".join(
        [report.layer, *textwrap.wrap(f"limit: {report.limit}", _TITLE if wide else _TITLE // 2)[:3]]
    )


def _curves(axis: Any, curves: list[DifferenceCurve]) -> None:
    noise = "noise of the forward" if curves[0].order == 1 else "noise of the gradient"
    for curve, colour in zip(curves, _COLOURS, strict=False):
        errors = [max(error, _SMALLEST) for error in curve.errors]
        label = f"direction {curve.direction + 1}"
        axis.loglog(curve.steps, errors, "o-", color=colour, ms=3.5, lw=1.4, label=label)
        axis.loglog(curve.steps, curve.noise, "--", color=colour, lw=0.9, alpha=0.7)
        chosen = curve.steps[curve.chosen], errors[curve.chosen]
        axis.loglog(*chosen, "o", color=colour, ms=10, mfc="none", mew=1.6)
    axis.axvline(curves[0].predicted, color=_GREY, lw=0.8, ls=":")
    axis.plot([], [], "--", color=_GREY, lw=0.9, label=noise)
    axis.plot([], [], ":", color=_GREY, lw=0.8, label="step matched to it")
    axis.plot([], [], "o", color=_GREY, ms=8, mfc="none", mew=1.4, ls="none", label="step chosen")
    _label(axis, _CURVE_TITLES[curves[0].order], "step h, relative to the inputs", "relative difference")
    axis.grid(True, which="major", color=_LIGHT, lw=0.6)
    axis.legend(fontsize=7, frameon=False)


_CURVE_TITLES = {
    1: "Finite differences of the layer − VJP",
    2: "Finite differences of the gradient − double backward",
}


def _bars(axis: Any, row: CheckRow) -> None:
    condition = row.name == "conditioning of J"
    values = [value if math.isfinite(value) else 1e20 for value in row.per_sample]
    positive = [value for value in values if value > 0] or [_SMALLEST]
    bottom = 1.0 if condition else 10.0 ** math.floor(math.log10(min(positive)) - 0.5)
    colours = [_WORST if row.sample == i else _OTHERS for i in range(len(values))]
    heights = [max(value - bottom, 0.0) for value in values]
    axis.set_yscale("log")
    axis.bar(range(len(values)), heights, bottom=bottom, color=colours, width=0.8)
    if row.tolerance is not None and max(values) > row.tolerance / 1e3:
        axis.axhline(row.tolerance, color=_GREY, lw=0.9, ls="--", label="ill-conditioned above")
        axis.legend(fontsize=7, frameon=False)
    axis.set_ylim(bottom, max(10 * bottom, 3 * max(values)))
    axis.set_xlim(-0.8, len(values) - 0.2)
    axis.xaxis.get_major_locator().set_params(integer=True)
    title = "Condition number of J" if condition else "Residual"
    _label(axis, f"{title} (worst: sample {row.sample})", "sample", "σ₁ / σₙ" if condition else "‖F(y)‖∞")
    axis.grid(True, axis="y", which="major", color=_LIGHT, lw=0.6)
    axis.set_axisbelow(True)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
