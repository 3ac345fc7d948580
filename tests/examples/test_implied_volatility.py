"""The example of implied volatilities, in a fast size, in each of its ways."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "implied_volatility"))  # it is no package

import quotes
import study

pytestmark = pytest.mark.plugin("invlayer-scipy")


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("core", ("serial", "lockstep")),
        ("vectorised", ("batched",)),
        pytest.param("pool", ("executor",), marks=pytest.mark.slow),
        pytest.param(
            "cluster", ("executor",), marks=[pytest.mark.cluster, pytest.mark.filterwarnings("default")]
        ),
    ],
)
def test_the_study_runs_in_each_way(
    way: str, how: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    study.main(["--options", "300", "--ways", way])
    title, line = capsys.readouterr().out.splitlines()
    assert title == "300 implied volatilities with gradients"
    assert line.split()[0] == way
    assert line.split()[1] in how


def test_a_wrong_gradient_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = quotes.vega
    monkeypatch.setattr(quotes, "vega", lambda *args: 1.01 * exact(*args))
    with pytest.raises(SystemExit, match=r"core: a volatility or a gradient is wrong"):
        study.main(["--options", "20", "--ways", "core"])


def test_vega_is_the_derivative_of_the_price() -> None:
    volatility, _, strike, maturity = quotes.market(5)
    volatility.requires_grad_()
    price = quotes.call_price(volatility, strike, maturity)
    (slope,) = torch.autograd.grad(price.sum(), volatility)
    torch.testing.assert_close(quotes.vega(volatility.detach(), strike, maturity), slope, rtol=1e-12, atol=0)
