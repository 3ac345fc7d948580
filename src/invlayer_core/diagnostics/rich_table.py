"""A report drawn by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invlayer_core.diagnostics.optional import import_optional
from invlayer_core.diagnostics.report import LayerReport, figure

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["rich_report", "rich_table"]

_STYLES = {"ok": "green", "suspicious": "yellow", "wrong": "bold red", "not available": "dim"}


def rich_table(report: LayerReport) -> Table:
    """The rows, verdicts in colour."""
    box = import_optional("rich.box", "report.table()")
    text = import_optional("rich.text", "report.table()").Text
    table: Table = import_optional("rich.table", "report.table()").Table(
        title=text("\n".join(report.heading)), title_justify="left", box=box.SIMPLE_HEAD, title_style=""
    )
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("largest", justify="right", no_wrap=True)
    table.add_column("accepted", justify="right", no_wrap=True)
    table.add_column("detail", ratio=1)
    for row in report.rows:
        verdict = text(row.verdict, style=_STYLES[row.verdict])
        table.add_row(text(row.name), verdict, figure(row.value), figure(row.tolerance), text(row.detail))
    return table


def rich_report(report: LayerReport) -> Any:
    """The table with notes and limit under it."""
    console = import_optional("rich.console", "report.__rich__()")
    text = import_optional("rich.text", "report.__rich__()").Text
    notes = [text(f"note: {note}", style="dim") for note in report.notes]
    style = "bold" if report.ok else "bold yellow"
    return console.Group(rich_table(report), *notes, text(f"limit: {report.limit}", style=style))
