"""Lower the losses of a transmission network by gradient descent through SciPy's power-flow solution.

Run as ``python examples/power_flow/demo.py``; the README beside this file tells what it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import invlayer_core as inv
from case14 import (
    BASE_MVA,
    GENERATOR_BUSES,
    LOAD_BUSES,
    PUBLISHED_VA_DEG,
    PUBLISHED_VM,
    SET_POINTS,
    injections,
)
from physics import flat_start, losses, mismatch, voltages

STEPS, SCENARIOS, SEED = 30, 64, 14
LEARNING_RATE = 5e-4  # p.u.²/MW, below the limit 2 / λ_max; the Hessian of the mean losses has λ_max ≈ 2900
V_MIN, V_MAX = 0.94, 1.10  # p.u., the band of the set-points
VM_TOLERANCE, VA_TOLERANCE = 2e-3, 2e-2  # p.u. and degrees: the archive's voltages are rounded
GRADIENT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Flows:
    """The flows of all scenarios under one choice of set-points."""

    set_points: Tensor  # (5,) p.u.
    y: Tensor  # (scenarios, 22), detached
    losses: Tensor  # (scenarios,) MW, differentiable with respect to the set-points
    info: inv.SolveInfo


def check_base_case(flow: inv.RootLayer) -> None:
    """Solve the case as published, and stop with a message if the voltages are not the published ones."""
    y = flow(SET_POINTS, *injections(), y0=flat_start())
    magnitude, angle = voltages(y, SET_POINTS)
    off_vm = (magnitude - PUBLISHED_VM).abs().max().item()
    off_va = (angle.rad2deg() - PUBLISHED_VA_DEG).abs().max().item()
    print(f"Base case: losses {BASE_MVA * losses(y, SET_POINTS).item():.3f} MW")
    print(f"  worst deviation from the published voltages: {off_vm:.1e} p.u., {off_va:.1e} degrees")
    if not (off_vm <= VM_TOLERANCE and off_va <= VA_TOLERANCE):
        raise SystemExit(f"FAILED: beyond {VM_TOLERANCE} p.u. or {VA_TOLERANCE} degrees")


def loss_per_load(flow: inv.RootLayer) -> Tensor:
    """Losses added per real load added at every load bus, (11,) in MW/MW, by one backward pass."""
    p, q = injections()
    p.requires_grad_()
    y = flow(SET_POINTS, p, q, y0=flat_start())
    (gradient,) = torch.autograd.grad(losses(y, SET_POINTS), p)
    return -gradient[LOAD_BUSES - 1]  # p starts at bus 2, and more load is less injection


def loss_per_load_by_differences(flow: inv.RootLayer, step: float = 2e-4) -> Tensor:
    """Repeat ``loss_per_load`` by central differences: 2 flows per load bus, all 22 solved as one batch."""
    p, q = injections()
    shift = step * torch.eye(len(p), dtype=p.dtype)[LOAD_BUSES - 1]
    y = flow(SET_POINTS, torch.cat([p - shift, p + shift]), q, y0=flat_start(2 * len(shift)))
    more, less = losses(y, SET_POINTS).chunk(2)
    return (more - less) / (2 * step)


def check_gradient(flow: inv.RootLayer) -> None:
    """Print both gradients side by side, and stop with a message if they differ."""
    implicit, differences = loss_per_load(flow), loss_per_load_by_differences(flow)
    relative = (implicit - differences).abs() / differences.abs()
    print("\nMore losses per more load, MW/MW\n  bus    implicit   differences   relative difference")
    for bus, *row in zip((LOAD_BUSES + 1).tolist(), implicit, differences, relative, strict=True):
        print("  {:3d}  {:10.7f}    {:10.7f}               {:.1e}".format(bus, *row))
    if not relative.max() <= GRADIENT_TOLERANCE:
        raise SystemExit(f"FAILED: the gradients differ by more than {GRADIENT_TOLERANCE}")


def draw_scenarios(count: int) -> tuple[Tensor, Tensor]:
    """Draw injections p (count, 13) and q (count, 9): every bus's load times its own factor in 0.7..1.2."""
    generator = torch.Generator().manual_seed(SEED)
    return injections(torch.empty(count, 14, dtype=torch.float64).uniform_(0.7, 1.2, generator=generator))


def solve_scenarios(set_points: Tensor, p: Tensor, q: Tensor, y0: Tensor) -> Flows:
    """Solve the flows of all scenarios, which share the set-points."""
    args = (set_points, p, q)
    y, info = inv.root(mismatch, y0, args, solver="scipy.fsolve", return_info=True)
    return Flows(set_points.detach().clone(), y.detach(), BASE_MVA * losses(y, set_points), info)


def lower_losses(p: Tensor, q: Tensor, steps: int) -> list[Flows]:
    """Descend on the set-points; every solve starts from the flows of the step before."""
    set_points = SET_POINTS.clone().requires_grad_()
    optimizer = torch.optim.SGD([set_points], lr=LEARNING_RATE)
    course = [solve_scenarios(set_points, p, q, flat_start(len(p)))]
    for _ in (bar := tqdm(range(steps), desc="lower losses", unit="step")):
        optimizer.zero_grad()
        course[-1].losses.mean().backward()
        optimizer.step()
        with torch.no_grad():
            set_points.clamp_(V_MIN, V_MAX)
        course.append(solve_scenarios(set_points, p, q, course[-1].y))
        bar.set_postfix_str(f"{course[-1].losses.mean().item():.3f} MW")
    return course


def report(course: list[Flows]) -> None:
    """Print the losses and the set-points at both ends, and stop with a message where a flow is unsolved."""
    ok = torch.stack([flows.info.ok for flows in course])
    worst = torch.stack([flows.info.residual for flows in course]).max().item()
    print(f"\nLoad scenarios: {ok.sum()} of {ok.numel()} flows solved, worst mismatch {worst:.0e} p.u.")
    before, after = (flows.losses.mean().item() for flows in (course[0], course[-1]))
    print(f"  mean losses {before:.3f} MW before, {after:.3f} MW after ({after / before - 1:+.1%})")
    print("  bus   set-point before   after [p.u.]")
    ends = course[0].set_points, course[-1].set_points
    for bus, old, new in zip((GENERATOR_BUSES + 1).tolist(), *ends, strict=True):
        print(f"  {bus:3d}              {old:.4f}   {new:.4f}")
    if not (ok.all() and after < before):
        raise SystemExit("FAILED: a flow is unsolved or the losses have not fallen")


def draw_losses(axes: Axes, course: list[Flows]) -> None:
    """Draw the losses over the steps, as the mean over the scenarios."""
    mean = [flows.losses.mean().item() for flows in course]
    axes.plot(mean, color="C0", lw=2, label=f"mean of {len(course[0].y)} load scenarios")
    for step, align in ((0, "left"), (len(mean) - 1, "right")):
        text = f"{mean[step]:.2f} MW"
        axes.annotate(text, (step, mean[step]), (0, 8), textcoords="offset points", ha=align)
    axes.set(title="Real losses", xlabel="gradient step", ylabel="losses [MW]")
    axes.margins(y=0.15)


def draw_profile(axes: Axes, course: list[Flows]) -> None:
    """Draw the voltage of every bus: as published, and before and after (mean and range of scenarios)."""
    buses = torch.arange(1, 15)
    for label, colour, flows in (("before", "C1", course[0]), ("after", "C0", course[-1])):
        magnitude, _ = voltages(flows.y, flows.set_points)
        axes.fill_between(buses, magnitude.amin(0), magnitude.amax(0), color=colour, alpha=0.2, lw=0)
        axes.plot(buses, magnitude.mean(0), "o-", color=colour, ms=4, label=f"{label}: mean and range")
    axes.plot(buses, PUBLISHED_VM, "kx", label="published base case")
    axes.axhline(V_MAX, color="C7", ls=":", label="upper limit of set-points")
    axes.set(title="Voltage profile", xlabel="bus", ylabel="voltage magnitude [p.u.]", xticks=buses.tolist())


def save_figure(course: list[Flows], path: Path) -> None:
    """Write both panels as a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(4, 5))
    draw_losses(left, course)
    draw_profile(right, course)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle("IEEE 14-bus network: gradient descent on generator voltages through scipy.fsolve")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the base case and its gradient, then lower the losses and draw the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="gradient steps, at least 1")
    parser.add_argument("--scenarios", type=int, default=SCENARIOS, help="load scenarios")
    parser.add_argument("--output", type=Path, default=Path("power_flow.png"), help="PNG file to write")
    options = parser.parse_args(argv)

    flow = inv.RootLayer(mismatch, solver="scipy.fsolve", options={"xtol": 1e-12})
    check_base_case(flow)
    check_gradient(flow)
    course = lower_losses(*draw_scenarios(options.scenarios), options.steps)
    report(course)
    save_figure(course, options.output)
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
