"""What :func:`~invlayer_core.diagnostics.check.check_layer` found: rows, curves, and the limit among them."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["CheckRow", "DifferenceCurve", "LayerReport", "RowVerdict"]

RowVerdict = Literal["ok", "suspicious", "wrong", "not available"]

_WIDTH = 110


@final
@dataclass(frozen=True)
class CheckRow:
    """One thing that was measured.

    Attributes
    ----------
    name : str
    verdict : {"ok", "suspicious", "wrong", "not available"}
    value : float or None
        The largest figure over directions and samples, relative where ``name`` compares two things.
    tolerance : float or None
        Up to where ``value`` is ok: what rounding, noise and finite differences leave open.
    detail : str
        In words; for a row that is not available, why.
    sample : int or None
        The worst sample, the batch flattened.
    per_sample : tuple of float
        One figure per sample, where there is one.
    """

    name: str
    verdict: RowVerdict
    value: float | None = None
    tolerance: float | None = None
    detail: str = ""
    sample: int | None = None
    per_sample: tuple[float, ...] = ()


@final
@dataclass(frozen=True)
class DifferenceCurve:
    """How far finite differences are from the derivative under test, over their step, along one direction.

    Attributes
    ----------
    order : int
        1: of the layer, compared with its VJP. 2: of the gradient, compared with double backward.
    direction : int
    steps : tuple of float
        Relative to the inputs.
    errors : tuple of float
        Relative; NaN where the layer could not be evaluated.
    noise : tuple of float
        The error that the noise of the forward makes at each step.
    chosen : int
        The position of the step that was taken.
    predicted : float
        The step that noise and third derivative ask for.
    uncertainty : float
        Of the chosen difference, relative.
    """

    order: int
    direction: int
    steps: tuple[float, ...]
    errors: tuple[float, ...]
    noise: tuple[float, ...]
    chosen: int
    predicted: float
    uncertainty: float


@final
@dataclass(frozen=True)
class LayerReport:
    """Everything that was measured about one layer, at one point.

    Attributes
    ----------
    layer : str
    inputs : tuple of str
        What it was differentiated with respect to.
    batch : tuple of int
        The batch dims of the output; ``()`` is one sample.
    systems : tuple of str
        Each implicit layer that was found behind the output, with its adjoint and linear solver.
    rows : tuple of CheckRow
    limit : str
        One sentence: what limits the gradient, or the check of it.
    curves : tuple of DifferenceCurve
    notes : tuple of str
        What was not checked, and why.
    """

    layer: str
    inputs: tuple[str, ...]
    batch: tuple[int, ...]
    systems: tuple[str, ...]
    rows: tuple[CheckRow, ...]
    limit: str
    curves: tuple[DifferenceCurve, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no row is suspicious or wrong."""
        return all(row.verdict in ("ok", "not available") for row in self.rows)

    def row(self, name: str) -> CheckRow:
        """The row of that name.

        Raises
        ------
        KeyError
            With the names there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(repr(row.name) for row in self.rows)}.")

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for ``json.dumps``; figures that are not finite become None."""
        data: dict[str, Any] = _plain({"ok": self.ok, **asdict(self)})
        return data

    def table(self) -> Table:
        """The rows as a ``rich`` table; needs the extra ``diagnostics``.

        Raises
        ------
        ImportError
            If rich is missing.
        """
        from invlayer_core.diagnostics.rich_table import rich_table

        return rich_table(self)

    def __rich__(self) -> Any:
        from invlayer_core.diagnostics.rich_table import rich_report

        return rich_report(self)

    def plot(self) -> Figure:
        """Finite-difference errors over the step, and residual and condition per sample.

        Returns
        -------
        matplotlib.figure.Figure
            Not shown, and known to no window system: save it with ``figure.savefig("check.png")``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        from invlayer_core.diagnostics.plot import plot_report

        return plot_report(self)

    @property
    def heading(self) -> tuple[str, ...]:
        """The lines above the table: the layer, its inputs, and what solves its derivative."""
        batch = f"batch {self.batch}" if self.batch else "one sample"
        inputs = ", ".join(self.inputs[:6]) + (
            f" and {len(self.inputs) - 6} more" if len(self.inputs) > 6 else ""
        )
        return (f"{self.layer}: {batch}, differentiated by {inputs}", *self.systems)

    def __str__(self) -> str:
        name = max(len(row.name) for row in self.rows)
        lines = [_line(row, name) for row in self.rows]
        blank = " " * len("limit: ")
        limit = textwrap.fill(f"limit: {self.limit}", _WIDTH, subsequent_indent=blank)
        notes = [textwrap.fill(f"note: {note}", _WIDTH, subsequent_indent="      ") for note in self.notes]
        heading = [textwrap.fill(line, _WIDTH, subsequent_indent="    ") for line in self.heading]
        return "\n".join([*heading, "", *lines, "", *notes, limit])


def figure(value: float | None) -> str:
    """A figure as tables show it."""
    return "" if value is None else f"{value:.1e}"


def _line(row: CheckRow, width: int) -> str:
    verdict = len("not available")
    start = f"{row.name:{width}}  {row.verdict:{verdict}}  {figure(row.value):>7}  "
    return textwrap.fill(
        start + row.detail, _WIDTH, subsequent_indent=" " * len(start), break_long_words=False
    ).rstrip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
