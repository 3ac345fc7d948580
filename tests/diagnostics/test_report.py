"""What a report shows: text, rich, matplotlib, plain data; and what it says where a library is missing."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tests.diagnostics import defects
from tests.diagnostics.defects import batch_of_a, cubic

import invlayer_core as inv


@pytest.fixture(scope="module")
def good() -> inv.LayerReport:
    a = batch_of_a()
    return inv.check_layer(inv.RootLayer(cubic), a, y0=torch.zeros_like(a))


@pytest.fixture(scope="module")
def bad() -> inv.LayerReport:
    return inv.check_layer(defects.WrongInOneSample.apply, batch_of_a())


def test_text(good: inv.LayerReport):
    lines = str(good).splitlines()
    assert lines[0] == "RootLayer(solver='torch.newton'): batch (4,), differentiated by args[0]"
    assert [line.split("  ")[0] for line in lines if line[:1].isalpha()][2:-1] == [
        row.name for row in good.rows
    ]
    assert max(map(len, lines)) <= 110
    assert lines[-2].startswith("limit: nothing stands out")


def test_text_of_a_defect(bad: inv.LayerReport):
    assert "limit: the backward differs from finite differences by 30 % in sample 2" in str(bad)
    assert not bad.ok


def rendered(item: object) -> str:
    console = Console(width=150, file=io.StringIO(), color_system=None)
    console.print(item)
    return console.file.getvalue()


def test_rich(bad: inv.LayerReport):
    assert isinstance(bad.table(), Table)
    assert bad.table().row_count == len(bad.rows)
    text = rendered(bad)
    assert all(row.name in text for row in bad.rows)
    assert "wrong" in text
    assert "30 % in sample 2" in text


def test_rich_takes_brackets_for_what_they_are(good: inv.LayerReport):
    report = dataclasses.replace(good, layer="layer[bold]", limit="[/bold] is no markup")
    assert "layer[bold]" in rendered(report)
    assert "[/bold] is no markup" in rendered(report)


def test_plot(good: inv.LayerReport, bad: inv.LayerReport):
    figure = good.plot()
    assert isinstance(figure, Figure)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert len(titles) == 4
    assert "Condition number of J (worst" in titles[3]
    assert len(bad.plot().axes) == 2
    first = figure.axes[0]
    drawn = [tuple(line.get_xdata()) for line in first.lines if len(line.get_xdata()) > 3]
    assert drawn.count(good.curves[0].steps) >= 2  # errors and noise
    figure.savefig(io.BytesIO())  # draws without a warning


def test_plot_of_a_report_with_nothing_to_draw():
    report = inv.check_layer(inv.implicit_function(conditions=cubic)(lambda a: a), batch_of_a())
    report.plot().savefig(io.BytesIO())


def test_plain_data(bad: inv.LayerReport):
    data = json.loads(json.dumps(bad.as_dict(), allow_nan=False))
    assert data["ok"] is False
    assert {row["name"]: row["verdict"] for row in data["rows"]}["VJP vs finite differences"] == "wrong"
    assert data["curves"][0]["steps"] == list(bad.curves[0].steps)


def test_plain_data_of_a_singular_sample():
    report = inv.check_layer(defects.singular, torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    assert report.row("conditioning of J").value == float("inf")
    json.dumps(report.as_dict(), allow_nan=False)


def test_reports_are_frozen(good: inv.LayerReport):
    for item in (good, good.rows[0], good.curves[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.layer = "another"


def test_an_unknown_row_is_named_with_those_there_are(good: inv.LayerReport):
    with pytest.raises(KeyError, match=r"no row 'noise'; there are 'determinism', "):
        good.row("noise")


@pytest.mark.parametrize(
    ("library", "show"), [("rich", "table"), ("rich", "__rich__"), ("matplotlib", "plot")]
)
def test_a_missing_library_is_named_with_its_extra(
    good: inv.LayerReport, monkeypatch: pytest.MonkeyPatch, library: str, show: str
):
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in (library, f"{library}.box", f"{library}.console", f"{library}.figure", f"{library}.text"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"report\.{show}\(\) needs {library}.*invlayer-core\[diagnostics\]"
    ):
        getattr(good, show)()
    assert "limit: " in str(good)


def test_neither_library_is_imported_before_it_is_asked_for():
    code = (
        "import sys, torch, invlayer_core as inv\n"
        "print(inv.check_layer(inv.RootLayer(lambda y, a: y**3 + y - a), torch.ones(2), y0=torch.zeros(2)))\n"
        "assert not {'rich', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
