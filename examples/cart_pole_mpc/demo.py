"""Learn the model inside a controller from what an expert does, through ipopt's solution.

Run as ``python examples/cart_pole_mpc/demo.py``; the README beside this file tells what it shows.
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

from cart_pole import STEP, forces, make_controller, plan
from invlayer_casadi import CasadiLayer

STEPS, DEMONSTRATIONS, SEED = 20, 16, 0
EXPERT = torch.tensor([0.30, 0.50], dtype=torch.float64)  # mass of the pole [kg], its length [m]
GUESS = torch.tensor([0.15, 0.80], dtype=torch.float64)
GRADIENT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Lesson:
    """One improvement: the model, how far its forces are from the expert's, and those forces."""

    model: Tensor
    loss: float
    planned: Tensor


def draw_states(count: int) -> Tensor:
    """Where the expert was watched: positions within 0.5 m, angles within 0.4 rad, some velocity."""
    generator = torch.Generator().manual_seed(SEED)
    spread = torch.tensor([0.5, 0.4, 0.3, 0.3], dtype=torch.float64)
    return spread * (2 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 1)


def check_gradient(controller: CasadiLayer, states: Tensor) -> None:
    """Print the gradient of the mean squared force beside central differences, and stop if they differ."""

    def effort(model: Tensor) -> Tensor:
        return forces(plan(controller, states, model)).square().mean()

    model = GUESS.log().requires_grad_()
    (implicit,) = torch.autograd.grad(effort(model), model)
    shifts = 1e-4 * torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack([effort(model + s) - effort(model - s) for s in shifts]) / 2e-4
    print("Mean squared force [N²], by the logarithm of")
    for name, ours, theirs in zip(("mass", "length"), implicit.tolist(), differences.tolist(), strict=True):
        print(f"  {name:6s}  implicit {ours:12.8f}   differences {theirs:12.8f}")
    if not torch.allclose(implicit, differences, rtol=GRADIENT_TOLERANCE, atol=1e-7):
        raise SystemExit(f"FAILED: the gradients differ by more than {GRADIENT_TOLERANCE}")


def learn(controller: CasadiLayer, states: Tensor, shown: Tensor, steps: int) -> list[Lesson]:
    """Descend on the model inside the controller, by L-BFGS, so that it plans what was shown."""
    model = GUESS.log().requires_grad_()
    optimizer = torch.optim.LBFGS([model], max_iter=1, max_eval=10, line_search_fn="strong_wolfe")
    course = []

    def lesson() -> Tensor:
        optimizer.zero_grad()
        planned = forces(plan(controller, states, model))
        loss = (planned - shown).square().mean()
        loss.backward()
        if not course or loss < course[-1].loss:
            course.append(Lesson(model.detach().exp(), loss.item(), planned.detach()))
        return loss

    for _ in (bar := tqdm(range(steps), desc="learn the model", unit="step")):
        optimizer.step(lesson)
        bar.set_postfix_str(f"{course[-1].loss:.2e} N²")
    return course


def report(course: list[Lesson], needed: float) -> None:
    """Print what was learned, and stop with a message if it is not the expert's model."""
    first, best = course[0], course[-1]
    print(f"\nMean squared error of the forces: {first.loss:.2e} N² before, {best.loss:.2e} N² after")
    print("             guess   learned   expert")
    rows = zip(("mass [kg]", "length [m]"), GUESS.tolist(), best.model.tolist(), EXPERT.tolist(), strict=True)
    for name, guess, learned, expert in rows:
        print(f"  {name:10s} {guess:.3f}   {learned:.4f}    {expert:.3f}")
    if not best.loss < needed * first.loss:
        raise SystemExit("FAILED: the plans have not become the expert's")


def draw_course(loss: Axes, model: Axes, course: list[Lesson]) -> None:
    """Draw the loss, and the model's parameters, over the steps."""
    loss.semilogy([lesson.loss for lesson in course], color="C0", lw=2)
    loss.set(title="Distance from the expert's plans", xlabel="improvement", ylabel="force error [N²]")
    for i, (name, colour) in enumerate((("mass of the pole [kg]", "C0"), ("length of the pole [m]", "C1"))):
        model.plot([lesson.model[i].item() for lesson in course], color=colour, lw=2, label=name)
        model.axhline(EXPERT[i].item(), color=colour, ls=":")
    model.set(title="Model inside the controller", xlabel="improvement")
    model.legend(frameon=False, fontsize="small", title="dotted: the expert's", title_fontsize="small")


def draw_plans(axes: Axes, course: list[Lesson], shown: Tensor) -> None:
    """Draw the planned forces of three states: the expert's, and those before and after learning."""
    times = STEP * torch.arange(shown.shape[1])
    for i in range(3):
        axes.step(
            times, shown[i], color="k", lw=3, alpha=0.25, where="post", label="expert" if i == 0 else None
        )
        before = "before" if i == 0 else None
        axes.step(times, course[0].planned[i], color=f"C{i}", ls=":", where="post", label=before)
        axes.step(
            times, course[-1].planned[i], color=f"C{i}", where="post", label="after" if i == 0 else None
        )
    axes.set(title="Plans from three states", xlabel="time [s]", ylabel="force [N]")
    axes.legend(frameon=False, fontsize="small")


def save_figure(course: list[Lesson], shown: Tensor, path: Path) -> None:
    """Write the three panels as a PNG."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    draw_course(left, middle, course)
    draw_plans(right, course, shown)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle("Cart and pole: learning a controller's model from demonstrations, through ipopt")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the gradient, watch the expert, learn, and draw the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of L-BFGS, at least 1")
    parser.add_argument("--demonstrations", type=int, default=DEMONSTRATIONS, help="states, at least 3")
    parser.add_argument("--output", type=Path, default=Path("cart_pole_mpc.png"), help="PNG file to write")
    options = parser.parse_args(argv)

    controller, states = make_controller(), draw_states(options.demonstrations)
    check_gradient(controller, states)
    with torch.no_grad():
        shown = forces(plan(controller, states, EXPERT.log()))
    course = learn(controller, states, shown, options.steps)
    report(course, needed=1e-6 if options.steps >= STEPS else 1.0)
    save_figure(course, shown, options.output)
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
