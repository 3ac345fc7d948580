"""Calibrate a robot's odometry by differentiating through the optimisation of its pose graph.

Run as ``python examples/pose_graph/demo.py``; the README beside this file tells what it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import invlayer_core as inv
from graph import BIAS, POSES, SE2, Costs, Drives, dead_reckoning, draw_drives

DRIVES, STEPS, SEED = 16, 25, 2


def make_layer(costs: Costs) -> inv.LeastSquaresLayer:
    """Poses that fit odometry and places best, wrong places counting little."""
    loss = {"start": None, "odometry": None, "places": inv.losses.GemanMcClure(2.0, event_dims=1)}
    return inv.LeastSquaresLayer(costs, manifold=SE2, loss=loss, event_dims=2, atol=1e-4)


def solve(layer: inv.LeastSquaresLayer, drives: Drives, **keywords: object) -> Tensor:
    poses: Tensor = layer(drives.odometry, drives.places, y0=dead_reckoning(drives.odometry), **keywords)
    return poses


def error(poses: Tensor, drives: Drives) -> Tensor:
    """The mean squared distance of poses from the truth."""
    return (poses - drives.truth)[..., :2].square().sum(-1).mean()


def check_gradient(layer: inv.LeastSquaresLayer, drives: Drives) -> None:
    """The gradient by the bias, by the implicit function, by DLM, and by differences of whole solves."""
    bias, gradients = layer.residuals.bias, {}
    for name, adjoint in (
        ("implicit", inv.adjoints.Implicit()),
        ("DLM", inv.adjoints.DLM(1e-3, central=True)),
    ):
        (gradients[name],) = torch.autograd.grad(error(solve(layer, drives, adjoint=adjoint), drives), bias)
    values = []
    with torch.no_grad():
        for shift in 1e-4 * torch.eye(3, dtype=bias.dtype):
            sides = []
            for sign in (1, -1):
                bias += sign * shift
                sides.append(error(solve(layer, drives), drives))
                bias -= sign * shift
            values.append((sides[0] - sides[1]) / 2e-4)
    gradients["differences"] = torch.stack(values)
    print("The gradient of the error by the bias of the odometry")
    for name, gradient in gradients.items():
        print(f"  {name:12s} {gradient.numpy().round(8)}")
    gap = (gradients["implicit"] - gradients["differences"]).norm() / gradients["differences"].norm()
    if not gap < 1e-4:
        raise SystemExit(f"FAILED: the gradients differ by {gap:.1e}")


def learn(layer: inv.LeastSquaresLayer, drives: Drives, steps: int) -> list[float]:
    """Calibrate bias and weights; the error on the way."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    course = []
    for _ in range(steps):
        loss = error(solve(layer, drives), drives)
        course.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return course


def draw(before: Tensor, after: Tensor, drives: Drives, path: Path) -> None:
    """Write one drive as a PNG: the truth, and the poses before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, style, poses in (
        ("truth", "k-", drives.truth),
        ("before", "C1o--", before),
        ("after", "C0o-", after),
    ):
        axes.plot(*poses[0, :, :2].T, style, ms=4, label=label)
    axes.set(title="A drive of the test set", aspect="equal")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Check a gradient, calibrate, and measure what it brings on other drives."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="gradient steps")
    parser.add_argument("--drives", type=int, default=DRIVES, help="drives to learn from")
    parser.add_argument("--output", type=Path, help="PNG file to write; needs matplotlib")
    options = parser.parse_args(argv)

    layer, test = make_layer(Costs()), draw_drives(64, SEED + 1)
    train = draw_drives(options.drives, SEED)
    check_gradient(layer, draw_drives(2, SEED))
    with torch.no_grad():
        before = solve(layer, test)
    learn(layer, train, options.steps)
    with torch.no_grad():
        after = solve(layer, test)
    print(
        f"Bias of the odometry: learned {layer.residuals.bias.detach().numpy().round(3)}, true {BIAS.numpy()}"
    )
    print(f"Root mean square distance from the true poses, {len(test.truth)} other drives of {POSES} poses")
    errors = {
        "odometry alone": dead_reckoning(test.odometry),
        "pose graph, before": before,
        "pose graph, calibrated": after,
    }
    distances = {name: error(poses, test).sqrt().item() for name, poses in errors.items()}
    for name, distance in distances.items():
        print(f"  {name:24s} {distance:.3f}")
    if not distances["pose graph, calibrated"] < distances["pose graph, before"]:
        raise SystemExit("FAILED: calibration has not helped")
    if options.output is not None:
        draw(before, after, test, options.output)
        print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
