"""Learn how far to trust each measurement, by differentiating through curve fitting.

Run as ``python examples/curve_fitting/demo.py``; the README beside this file tells what it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import invlayer_core as inv

CURVES, STEPS, SEED = 64, 60, 5
TIMES = torch.linspace(0, 3, 24, dtype=torch.float64)
NOISE = 0.01 + 0.3 * torch.exp(-((TIMES - 1.0) ** 2) / 0.1)  # a sensor that is blinded around t = 1
ADJOINTS = {
    "Implicit()": inv.adjoints.Implicit(),
    "Unrolled()": inv.adjoints.Unrolled(),
    "Truncated(5)": inv.adjoints.Truncated(5),
    "DLM(1e-3, central=True)": inv.adjoints.DLM(1e-3, central=True),
}


def decay(y: dict[str, Tensor]) -> Tensor:
    """a exp(−b t) + c at all times, (*batch, 24)."""
    a, b, c = (y[name].unsqueeze(-1) for name in ("a", "b", "c"))
    return a * torch.exp(-b * TIMES) + c


def weighted(y: dict[str, Tensor], measured: Tensor, log_weights: Tensor) -> Tensor:
    """The residuals that are squared and summed: each with a weight of its own, shared by all curves."""
    return log_weights.exp() * (decay(y) - measured)


def draw_curves(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """True parameters, and what the sensor measures of them."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, count, generator=generator, dtype=torch.float64)
    truth = {"a": 1 + draw[0], "b": 0.8 + draw[1], "c": draw[2] - 0.5}
    noise = torch.randn(count, len(TIMES), generator=generator, dtype=torch.float64)
    return truth, decay(truth) + NOISE * noise


def start(count: int) -> dict[str, Tensor]:
    """Where every fit starts."""
    return {
        name: torch.full((count,), value, dtype=TIMES.dtype)
        for name, value in (("a", 1.5), ("b", 1.3), ("c", 0.0))
    }


def error(fitted: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """The mean squared error of the parameters."""
    return torch.stack([(fitted[name] - truth[name]).square().mean() for name in truth]).mean()


def compare_adjoints(fit: inv.LeastSquaresLayer, log_weights: Tensor) -> dict[str, Tensor]:
    """The same gradient by every adjoint, which is chosen per call."""
    truth, measured = draw_curves(8, SEED)
    gradients = {}
    for name, adjoint in ADJOINTS.items():
        leaf = log_weights.detach().clone().requires_grad_()
        fitted = fit(measured, leaf, y0=start(8), adjoint=adjoint)
        (gradients[name],) = torch.autograd.grad(error(fitted, truth), leaf)
    exact = gradients["Implicit()"]
    print("The gradient by each adjoint, off that of Implicit() by")
    for name, gradient in gradients.items():
        print(f"  {name:24s} {float((gradient - exact).norm() / exact.norm()):.1e}")
    return gradients


def learn(fit: inv.LeastSquaresLayer, curves: int, steps: int) -> tuple[Tensor, list[float]]:
    """Weights under which the fits of the training curves come out right, and the errors on the way."""
    truth, measured = draw_curves(curves, SEED + 1)
    log_weights = torch.zeros(len(TIMES), dtype=TIMES.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([log_weights], lr=0.1)
    course = []
    for _ in range(steps):
        fitted = fit(measured, log_weights, y0=start(curves))
        loss = error(fitted, truth)
        course.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return log_weights.detach(), course


def root_error(fit: inv.LeastSquaresLayer, log_weights: Tensor) -> float:
    """The error of fits to curves that were not trained on."""
    truth, measured = draw_curves(500, SEED + 2)
    with torch.no_grad():
        return error(fit(measured, log_weights, y0=start(500)), truth).sqrt().item()


def draw(course: list[float], log_weights: Tensor, path: Path) -> None:
    """Write the course of learning and the weights as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.semilogy([value**0.5 for value in course])
    left.set(title="Error of the fitted parameters", xlabel="step", ylabel="root mean square")
    for label, weights in (("learned", log_weights.exp()), ("1 / noise", 1 / NOISE)):
        right.semilogy(TIMES, weights / weights.mean(), "o-", ms=4, label=label)
    right.set(title="Weight of each measurement", xlabel="t")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the adjoints, learn the weights, and compare them with what is best."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="gradient steps")
    parser.add_argument("--curves", type=int, default=CURVES, help="curves to learn from")
    parser.add_argument("--output", type=Path, help="PNG file to write; needs matplotlib")
    options = parser.parse_args(argv)

    fit = inv.LeastSquaresLayer(weighted, event_dims=0)  # y is a dict of numbers, each (batch,)
    equal, best = torch.zeros_like(TIMES), -NOISE.log()
    compare_adjoints(fit, equal)
    learned, course = learn(fit, options.curves, options.steps)
    errors = {
        name: root_error(fit, w) for name, w in (("equal", equal), ("learned", learned), ("1 / noise", best))
    }
    print("Root mean square error of the parameters of 500 other curves, by the weights of measurements")
    for name, value in errors.items():
        print(f"  {name:10s} {value:.4f}")
    if not errors["learned"] < errors["equal"]:
        raise SystemExit("FAILED: learning has not helped")
    if options.output is not None:
        draw(course, learned, options.output)
        print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
