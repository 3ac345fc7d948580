"""A report as a figure, by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invlayer_core.diagnostics.optional import import_optional
from invlayer_core.diagnostics.report import CheckRow, DifferenceCurve, LayerReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_report"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe & Ito: told apart by colour-blind readers, too
_SMALLEST = 1e-17  # errors of zero are drawn here
_GREY = "#666666"


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
    figure.suptitle(_title(report), fontsize=10, x=0.01, ha="left")
    return figure


def _title(report: LayerReport) -> str:
    import textwrap

    return "\n".join([report.layer, *textwrap.wrap(f"limit: {report.limit}", 110)[:2]])


def _curves(axis: Any, curves: list[DifferenceCurve]) -> None:
    for curve, colour in zip(curves, _COLOURS, strict=False):
        errors = [max(error, _SMALLEST) for error in curve.errors]
        axis.loglog(
            curve.steps, errors, "o-", color=colour, ms=3.5, lw=1.3, label=f"direction {curve.direction + 1}"
        )
        axis.loglog(curve.steps, curve.noise, "--", color=colour, lw=0.8, alpha=0.7)
        axis.loglog(
            curve.steps[curve.chosen], errors[curve.chosen], "o", color=colour, ms=10, mfc="none", mew=1.6
        )
    axis.plot([], [], "--", color=_GREY, lw=0.8, label="noise of the forward")
    axis.plot([], [], "o", color=_GREY, ms=10, mfc="none", mew=1.6, label="chosen step")
    first = curves[0].order == 1
    axis.set_title(
        "Finite differences vs VJP" if first else "Differences of the gradient vs double backward",
        fontsize=10,
    )
    axis.set_xlabel("step h, relative to the inputs")
    axis.set_ylabel("relative difference")
    axis.grid(True, which="major", color="#dddddd", lw=0.6)
    axis.legend(fontsize=7, frameon=False)


def _bars(axis: Any, row: CheckRow) -> None:
    values = [max(value, _SMALLEST) for value in row.per_sample]
    colours = ["#D55E00" if row.sample == i else "#56B4E9" for i in range(len(values))]
    low = min(values) / 3
    axis.bar(range(len(values)), [value - low for value in values], bottom=low, color=colours, width=0.8)
    axis.set_yscale("log")
    residual = row.name == "residual"
    axis.set_title("Residual per sample" if residual else "Condition of J per sample", fontsize=10)
    axis.set_xlabel("sample")
    axis.set_ylabel("‖F(y)‖∞" if residual else "σ₁ / σₙ")
    if row.tolerance is not None and max(values) > row.tolerance / 1e3:
        axis.axhline(row.tolerance, color=_GREY, lw=0.8, ls="--")
    axis.grid(True, axis="y", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
