"""Learn a model of returns for the portfolio that it leads to, not for the returns themselves.

Run as ``python examples/portfolio/demo.py``; the README beside this file tells what it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cvxpy as cp
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from invlayer_cvxpy import CvxpyLayer

ASSETS, FEATURES, DAYS, SEED = 8, 5, 120, 3
RISK_AVERSION = 2.0
DEGREE = 5  # of the true dependence of returns on features; the model is linear
EPOCHS, LEARNING_RATE = 60, 0.02


@dataclass(frozen=True)
class Market:
    """What is seen (features), what is to be known (mean returns), and what both portfolios are judged by."""

    features: Tensor  # (days, FEATURES)
    returns: Tensor  # (days, ASSETS), in per cent

    def half(self, *, first: bool) -> Market:
        """The days for training, or those for testing."""
        middle = len(self.features) // 2
        days = slice(None, middle) if first else slice(middle, None)
        return Market(self.features[days], self.returns[days])


def market(days: int = 2 * DAYS, seed: int = SEED) -> Market:
    """Returns that depend on the features by a polynomial (as Elmachtoub & Grigas 2022 draw theirs)."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.bernoulli(torch.full((ASSETS, FEATURES), 0.5), generator=generator)
    features = torch.randn(days, FEATURES, generator=generator)
    index = (features @ loadings.T) / FEATURES**0.5
    returns = (0.05 * index + 0.1 ** (1 / DEGREE)) ** DEGREE + 0.3 * index.clamp(min=0) ** 2
    return Market(features, returns - returns.mean())


def factor_risk(seed: int = SEED) -> np.ndarray:
    """A matrix R with covariance RᵀR of the assets: two factors, and noise of their own."""
    generator = np.random.default_rng(seed)
    factors, noise = (
        0.3 * generator.standard_normal((2, ASSETS)),
        np.diag(0.2 + 0.3 * generator.random(ASSETS)),
    )
    return np.concatenate([factors, noise])


def portfolio_layer(risk: np.ndarray) -> CvxpyLayer:
    """The mean-variance portfolio for expected returns: maximise μᵀx − γ ‖R x‖², x ≥ 0, Σx = 1."""
    x, mu = cp.Variable(ASSETS), cp.Parameter(ASSETS)
    utility = mu @ x - RISK_AVERSION * cp.sum_squares(risk @ x)
    return CvxpyLayer(cp.Problem(cp.Maximize(utility), [x >= 0, cp.sum(x) == 1]), [mu], [x])


def utility(weights: Tensor, returns: Tensor, risk: Tensor) -> Tensor:
    """What the portfolio was worth, ``(days,)``."""
    return (weights * returns).sum(-1) - RISK_AVERSION * (weights @ risk.T).square().sum(-1)


@dataclass(frozen=True)
class Training:
    """A linear model of returns, and its regret on the test days after every epoch."""

    model: torch.nn.Linear
    regret: list[float]


class Experiment:
    """Both ways to train, on one market."""

    def __init__(self, data: Market, epochs: int = EPOCHS) -> None:
        risk = factor_risk()
        self.layer, self.risk, self.epochs = portfolio_layer(risk), torch.from_numpy(risk), epochs
        self.train, self.test = data.half(first=True), data.half(first=False)
        with torch.no_grad():
            self.best = self.value(self.test.returns, self.test)

    def value(self, predicted: Tensor, data: Market) -> Tensor:
        """The utility of the portfolios that a prediction leads to."""
        (weights,) = self.layer(predicted)
        return utility(weights, data.returns, self.risk)

    @torch.no_grad()
    def regret(self, model: torch.nn.Linear) -> float:
        """What is lost on the test days against knowing the returns, in per cent of that utility."""
        lost = (self.best - self.value(model(self.test.features), self.test)).mean()
        return float(100 * lost / self.best.mean())

    def two_stage(self) -> Training:
        """Least squares on the returns, then the portfolio: the exact minimiser of the mean squared error."""
        model = linear_model()
        design = torch.cat([self.train.features, torch.ones(len(self.train.features), 1)], 1)
        solution = torch.linalg.lstsq(design, self.train.returns).solution
        with torch.no_grad():
            model.weight.copy_(solution[:-1].T)
            model.bias.copy_(solution[-1])
        return Training(model, [self.regret(model)] * (self.epochs + 1))

    def decision_focused(self, start: torch.nn.Linear) -> Training:
        """Gradient ascent on the utility itself, through the portfolio, from where least squares ended."""
        model = linear_model()
        model.load_state_dict(start.state_dict())
        optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        regret = [self.regret(model)]
        for _ in range(self.epochs):
            optimiser.zero_grad()
            (-self.value(model(self.train.features), self.train).mean()).backward()
            optimiser.step()
            regret.append(self.regret(model))
        return Training(model, regret)


def linear_model() -> torch.nn.Linear:
    return torch.nn.Linear(FEATURES, ASSETS, dtype=torch.float64)


def check_gradient(experiment: Experiment, model: torch.nn.Linear, step: float = 1e-5) -> float:
    """The gradient of the mean utility along a random direction, against central differences: the error."""
    direction = torch.randn(
        model.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def mean_utility(weight: Tensor) -> Tensor:
        predicted = experiment.train.features @ weight.T + model.bias.detach()
        return experiment.value(predicted, experiment.train).mean()

    weight = model.weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_utility(weight), weight)
    with torch.no_grad():
        ahead, behind = (mean_utility(weight + s * step * direction) for s in (1, -1))
    return abs(float((gradient * direction).sum() - (ahead - behind) / (2 * step)))


def draw(experiment: Experiment, two_stage: Training, focused: Training, path: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    draw_regret(left, two_stage, focused)
    draw_days(middle, experiment, two_stage, focused)
    draw_predictions(right, experiment, two_stage, focused)
    figure.savefig(path, dpi=140)


def draw_regret(axes: Axes, two_stage: Training, focused: Training) -> None:
    axes.plot(two_stage.regret, color="C7", label="two-stage (least squares)")
    axes.plot(focused.regret, color="C0", label="decision-focused")
    axes.set(xlabel="epoch", ylabel="regret on test days, %", ylim=(0, None), title="What is lost")
    axes.legend(frameon=False)


@torch.no_grad()
def draw_days(axes: Axes, experiment: Experiment, two_stage: Training, focused: Training) -> None:
    gained = [
        experiment.value(each.model(experiment.test.features), experiment.test).cumsum(0)
        for each in (two_stage, focused)
    ]
    axes.plot(experiment.best.cumsum(0), color="k", lw=1, ls=":", label="returns known")
    for line, colour, label in zip(gained, ("C7", "C0"), ("two-stage", "decision-focused"), strict=True):
        axes.plot(line, color=colour, label=label)
    axes.set(xlabel="test day", ylabel="utility, summed up", title="Day by day")
    axes.legend(frameon=False)


@torch.no_grad()
def draw_predictions(axes: Axes, experiment: Experiment, two_stage: Training, focused: Training) -> None:
    returns = experiment.test.returns.flatten()
    for each, colour in ((two_stage, "C7"), (focused, "C0")):
        axes.scatter(returns, each.model(experiment.test.features).flatten(), s=4, alpha=0.4, color=colour)
    axes.axline((0, 0), slope=1, color="k", lw=0.8, ls=":")
    axes.set(xlabel="return, %", ylabel="predicted return, %", title="Worse forecasts, better portfolios")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=Path("portfolio.png"))
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    experiment = Experiment(market(), options.epochs)
    two_stage = experiment.two_stage()
    gap = check_gradient(experiment, two_stage.model)
    print(f"Gradient of the utility through 120 programs: {gap:.1e} from central differences")
    if not gap < 1e-6:
        raise SystemExit("FAILED: the gradient is not that of the utility")
    focused = experiment.decision_focused(two_stage.model)
    before, after = two_stage.regret[-1], focused.regret[-1]
    print(f"Regret on {DAYS} test days: {before:.1f} % two-stage, {after:.1f} % decision-focused")
    if options.epochs >= EPOCHS and not focused.regret[-1] < 0.9 * two_stage.regret[-1]:
        raise SystemExit("FAILED: decision-focused training did not lower the regret")
    draw(experiment, two_stage, focused, options.output)
    print(f"Drawn: {options.output}")


if __name__ == "__main__":
    main()
