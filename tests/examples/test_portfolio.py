"""The portfolio example: its gradient, what it claims, and its plot."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "portfolio" / "demo.py"

pytestmark = [pytest.mark.plugin("invlayer-cvxpy"), pytest.mark.usefixtures("float64")]


@pytest.fixture
def demo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("portfolio_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_training_for_the_decision_lowers_the_regret(demo: ModuleType) -> None:
    experiment = demo.Experiment(demo.market(days=80), epochs=25)
    two_stage = experiment.two_stage()
    assert demo.check_gradient(experiment, two_stage.model) < 1e-9
    focused = experiment.decision_focused(two_stage.model)
    with torch.no_grad():
        gained = [
            float(experiment.value(each.model(experiment.train.features), experiment.train).mean())
            for each in (two_stage, focused)
        ]
    assert gained[1] > gained[0]
    assert len(focused.regret) == 26


def test_knowing_the_returns_is_best(demo: ModuleType) -> None:
    experiment = demo.Experiment(demo.market(days=40), epochs=0)
    guess = experiment.value(experiment.test.returns + 0.1 * torch.randn(20, demo.ASSETS), experiment.test)
    assert (experiment.best >= guess - 1e-12).all()


def test_the_script_runs_and_draws(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--epochs", "1", "--output", str(tmp_path / "portfolio.png")])
    assert (tmp_path / "portfolio.png").stat().st_size > 10_000
    assert re.search(r"Regret on 120 test days: [\d.]+ % two-stage", capsys.readouterr().out)
