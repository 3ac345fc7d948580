"""Curve fit a exp(−b x) + c, 50 points: forward beside Gauss–Newton by hand, backward beside its floor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from harness import compare, options
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import invlayer_core as inv

POINTS = 50
x = torch.linspace(0, 3, POINTS)


def residuals(p: Tensor, y: Tensor) -> Tensor:
    a, b, c = p.unsqueeze(-1).unbind(-2)
    return a * torch.exp(-b * x) + c - y


def jacobian(p: Tensor, _y: Tensor) -> Tensor:
    decay = torch.exp(-p[..., 1:2] * x)
    return torch.stack([decay, -p[..., :1] * x * decay, torch.ones_like(decay)], -1)


def hessian(p: Tensor, y: Tensor) -> Tensor:
    """JᵀJ + Σ rᵢ ∇²rᵢ."""
    a, b, c = p.unsqueeze(-1).unbind(-2)
    decay = torch.exp(-b * x)
    left, slope = a * decay + c - y, -x * decay
    J = torch.stack([decay, a * slope, torch.ones_like(decay)], -1)
    cross, own = (left * slope).sum(-1), (left * a * x * x * decay).sum(-1)
    zero = torch.zeros_like(cross)
    curved = torch.stack([zero, cross, zero, cross, own, zero, zero, zero, zero], -1)
    return J.mT @ J + curved.unflatten(-1, (3, 3))


class ByHand(torch.autograd.Function):
    """Gauss–Newton with the analytic J; backward by the exact Hessian and one product."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        p = torch.ones(len(y), 3)
        for _ in range(50):
            decay = torch.exp(-p[:, 1:2] * x)
            r = p[:, :1] * decay + p[:, 2:] - y
            J = torch.stack([decay, -p[:, :1] * x * decay, torch.ones_like(decay)], 2)
            gradient, gram = torch.bmm(J.mT, r[:, :, None]), torch.bmm(J.mT, J)
            step = torch.linalg.solve(gram, gradient)[:, :, 0]
            p = p - step
            if step.abs().max() < 1e-10:
                break
        ctx.save_for_backward(y, p)
        return p

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        y, p = ctx.saved_tensors
        u = torch.linalg.solve(hessian(p, y), cotangent.unsqueeze(-1))
        return torch.bmm(jacobian(p, y), u)[:, :, 0]


def peak(call: Callable[[], object]) -> float:
    """The most memory that a call holds at a time, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def workload(batch: int, quick: bool) -> None:
    torch.manual_seed(0)
    true = torch.tensor([2.0, 1.0, 0.5]) * (1 + 0.2 * (2 * torch.rand(batch, 3) - 1))
    data = residuals(true, torch.zeros(batch, POINTS)) + 0.02 * torch.randn(batch, POINTS)
    data.requires_grad_()
    cotangent, start = torch.randn(batch, 3), torch.ones(batch, 3)
    H, J = torch.randn(batch, 3, 3) + 5 * torch.eye(3), torch.randn(batch, POINTS, 3)

    def layer(**known: Any) -> Callable[[], Tensor]:
        known = {"solver": "torch.gauss_newton", **known}
        return lambda: inv.least_squares(residuals, start, data, **known)

    adjoints = inv.adjoints
    known: dict[str, Any] = {"jacobian": jacobian, "hessian": hessian}
    layers: dict[str, Callable[[], Tensor]] = {
        "by hand, analytic J and Hessian": lambda: ByHand.apply(data),
        "gauss_newton": layer(),
        "gauss_newton, jacobian=": layer(jacobian=jacobian),
        "gauss_newton, jacobian=, hessian=": layer(**known),
        "levenberg_marquardt, jacobian=": layer(solver="torch.levenberg_marquardt", jacobian=jacobian),
        "dogleg, jacobian=": layer(solver="torch.dogleg", jacobian=jacobian),
        "Unrolled()": layer(adjoint=adjoints.Unrolled(), jacobian=jacobian),
        "Truncated(5)": layer(adjoint=adjoints.Truncated(5), jacobian=jacobian),
        "DLM(1e-4, central=True)": layer(adjoint=adjoints.DLM(1e-4, central=True), **known),
        "DLM(1e-2)": layer(adjoint=adjoints.DLM(1e-2), **known),
    }
    if not quick:
        layers["gauss_newton, jacobian=, hessian=, compile=True"] = layer(**known, compile=True)
    exact = torch.autograd.grad(layers["by hand, analytic J and Hessian"](), data, cotangent)[0]

    def backward(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, data, cotangent, retain_graph=True)[0]

    backwards: dict[str, Callable[[], object]] = {
        "floor: 3×3 solve + J u": lambda: torch.bmm(J, torch.linalg.solve(H, cotangent)[:, :, None])
    }
    print(f"\nB = {batch}: error of the gradient, peak memory of forward + backward in MiB")
    for name, run in layers.items():
        y = run()
        gradient = backward(y)
        error = float((gradient - exact).norm() / exact.norm())
        gc.collect()
        print(f"  {name:48s} {error:8.1e} {peak(lambda run=run: backward(run())):8.2f}")
        backwards[name] = lambda y=y: backward(y)
    compare(f"Forward, B = {batch}", layers, quick=quick)
    compare(f"Backward, B = {batch}", backwards, quick=quick)


if __name__ == "__main__":
    quick = options().quick
    for batch in (16, 512):
        workload(batch, quick)
