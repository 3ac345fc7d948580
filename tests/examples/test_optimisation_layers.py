"""The examples of curve fitting and of the pose graph, in a fast size."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"  # scripts, not packages


def load(folder: str, name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A module of an example, under a name that no other example's modules have."""
    spec = spec_from_file_location(f"{folder}_{name}", EXAMPLES / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_curve_fitting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = load("curve_fitting", "demo", monkeypatch)
    picture = tmp_path / "curve_fitting.png"
    demo.main(["--steps", "4", "--curves", "16", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "DLM(1e-3, central=True)" in capsys.readouterr().out


def test_adjoints_of_curve_fitting_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("curve_fitting", "demo", monkeypatch)
    fit = demo.inv.LeastSquaresLayer(demo.weighted, event_dims=0)
    exact, *others = demo.compare_adjoints(fit, torch.zeros_like(demo.TIMES)).values()
    for other in others:
        assert (other - exact).norm() < 1e-3 * exact.norm()


def test_pose_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "graph", load("pose_graph", "graph", monkeypatch))
    demo = load("pose_graph", "demo", monkeypatch)
    picture = tmp_path / "pose_graph.png"
    demo.main(["--steps", "3", "--drives", "2", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "pose graph, calibrated" in printed
