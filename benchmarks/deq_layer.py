"""A deep equilibrium z = tanh(W z + U x + b): forward beside plain iteration, backward beside 24 products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import compare, options
from torch import Tensor

import invlayer_core as inv

N, BATCH = 256, 64


def workload(quick: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, N)
    weight = (0.9 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    u = (torch.randn(N, N) / N**0.5).requires_grad_()
    bias = (0.1 * torch.randn(N)).requires_grad_()
    x = (0.3 * torch.randn(BATCH, N)).requires_grad_()
    cotangent = torch.randn(BATCH, N)
    parameters = (weight, u, bias, x)

    def step(z: Tensor, weight: Tensor, u: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + x @ u.T + bias)

    def iterate(_z0: Tensor, *args: Tensor) -> Tensor:
        z = torch.zeros(BATCH, N)
        for _ in range(500):
            z = step(z, *args)
        return z

    solution = iterate(x, *(p.detach() for p in parameters))
    slope = 1 - solution**2
    exact_weights = torch.linalg.solve(torch.eye(N) - (slope.unsqueeze(-1) * weight.detach()).mT, cotangent)

    def pull_back(w: Tensor) -> tuple[Tensor, ...]:
        fresh = [p.detach().requires_grad_() for p in parameters]
        return torch.autograd.grad(step(solution, *fresh), fresh, w)

    exact = pull_back(exact_weights)

    def floor() -> tuple[Tensor, ...]:
        w, plain = cotangent, weight.detach()
        for _ in range(24):
            w = (w * slope) @ plain
        return pull_back(w)

    def by_iteration() -> tuple[Tensor, ...]:
        w, plain = cotangent, weight.detach()
        for k in range(500):
            new = cotangent + (w * slope) @ plain
            if k % 4 == 3 and bool((new - w).norm() <= 1e-8 * new.norm()):
                return pull_back(new)
            w = new
        return pull_back(w)

    def layer(method: inv.linear.LinearSolver) -> Tensor:
        adjoint = inv.adjoints.Implicit(linear_solver=method)
        y0 = torch.zeros(BATCH, N)
        result: Tensor = inv.fixed_point(step, y0, parameters, solver=iterate, adjoint=adjoint)
        return result

    def solved(solver: str, **keywords: object) -> Tensor:
        y0 = torch.zeros(BATCH, N)
        result: Tensor = inv.fixed_point(step, y0, parameters, solver=solver, **keywords)  # type: ignore[arg-type]
        return result

    def backward_of(z: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(z, parameters, cotangent, retain_graph=True)

    methods = {
        "fixed_point, Neumann": inv.linear.Neumann(rtol=1e-8, check_every=2),
        "fixed_point, BiCGStab": inv.linear.BiCGStab(rtol=1e-9),
        "fixed_point, GMRES": inv.linear.GMRES(rtol=1e-9),
        "fixed_point, LU": inv.linear.LU(),
    }
    cases = {
        "floor: 24 products and the parameters' vjp": floor,
        "fixed-point iteration by hand": by_iteration,
    }
    for name, method in methods.items():
        backward = backward_of(layer(method))
        gap = [(a - b).norm() / b.norm() for a, b in zip(backward(), exact, strict=True)]
        cases[f"{name} (error {float(max(gap)):.0e})"] = backward
    adjoints = {
        "Phantom(1)": inv.adjoints.Phantom(1),
        "Truncated(24), by torch.anderson": inv.adjoints.Truncated(24),
        "Unrolled(), by torch.anderson": inv.adjoints.Unrolled(),
    }
    for name, adjoint in adjoints.items():
        backward = backward_of(solved("torch.anderson", adjoint=adjoint))
        gap = [(a - b).norm() / b.norm() for a, b in zip(backward(), exact, strict=True)]
        cases[f"{name} (error {float(max(gap)):.0e})"] = backward
    compare(f"Deep equilibrium, n = {N}, B = {BATCH}, backward", cases, quick=quick)

    def plain() -> Tensor:
        """Until a step is shorter than 1e-10 of z, asked every fourth time."""
        z, inner = torch.zeros(BATCH, N), [p.detach() for p in parameters]
        for k in range(500):
            new = step(z, *inner)
            if k % 4 == 3 and bool((new - z).norm() <= 1e-10 * new.norm()):
                return new
            z = new
        return z

    tight = {"ftol": 1e-10}
    forwards: dict[str, Callable[[], Tensor]] = {
        "plain iteration by hand": plain,
        "torch.anderson, memory 0": lambda: solved("torch.anderson", options={**tight, "memory": 0}),
        "torch.anderson": lambda: solved("torch.anderson", options=tight),
        "torch.broyden": lambda: solved("torch.broyden", options=tight),
        "torch.newton": lambda: solved("torch.newton"),
    }
    for name, run in list(forwards.items()):
        error = float((run().detach() - solution).norm() / solution.norm())
        forwards[f"{name} (error {error:.0e})"] = forwards.pop(name)
    compare(f"Deep equilibrium, n = {N}, B = {BATCH}, forward", forwards, quick=quick)


if __name__ == "__main__":
    workload(options().quick)
