"""2-D nonlinear Poisson, −Δy + y³ = θ on a 128 × 128 grid: the backward pass beside SciPy's sparse LU.

f is torch and matrix-free; the dense Jacobian would take 2 GiB. The floor assembles J, factorises it by
``scipy.sparse.linalg.splu`` as it comes, and solves once. Gradients are compared with that solution, refined.
"""

from __future__ import annotations

import resource
import time
from functools import partial

import scipy.sparse as sp
import torch
from harness import compare, options
from scipy.sparse.linalg import splu
from torch import Tensor

import invlayer_core as inv
from invlayer_core.adjoints import Implicit
from invlayer_core.linear import Factor, SparseLU


def conditions(y: Tensor, theta: Tensor, side: int) -> Tensor:
    grid, scale = y.view(side, side), (side + 1.0) ** 2
    p = torch.nn.functional.pad(grid, (1, 1, 1, 1))
    stencil = 4 * grid - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]
    return (scale * stencil).reshape(-1) + y**3 - theta


def laplacian(side: int) -> sp.csc_matrix:
    line = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(side, side))
    unit = sp.eye(side)
    return ((side + 1.0) ** 2 * (sp.kron(unit, line) + sp.kron(line, unit))).tocsc()


def assemble(linear: sp.csc_matrix, y: Tensor) -> sp.csc_matrix:
    return (linear + sp.diags(3 * y.numpy() ** 2)).tocsc()


def factor_of(lu: object) -> Factor:
    return Factor(lu.solve, lambda b: lu.solve(b, "T"))  # type: ignore[attr-defined]


def newton(linear: sp.csc_matrix, theta: Tensor) -> tuple[Tensor, Factor]:
    """Newton's method with SciPy's LU; hands over the factor of its last step."""
    y = torch.zeros_like(theta)
    for _ in range(30):
        lu = splu(assemble(linear, y))
        step = lu.solve(linear @ y.numpy() + y.numpy() ** 3 - theta.numpy())
        y = y - torch.from_numpy(step)
        if abs(step).max() < 1e-12:
            break
    return y, factor_of(lu)


def peak() -> float:
    """MiB of memory the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def workload(side: int, quick: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    n, linear, f = side**2, laplacian(side), partial(conditions, side=side)
    steps = torch.arange(n) / side
    theta = (200 * torch.sin(3 * steps) + 50 * torch.randn(n, generator=generator)).requires_grad_()
    cotangent = torch.randn(n, generator=generator)

    began = time.process_time()
    pattern = inv.jacobians.detect_sparsity(f, torch.zeros(n), theta)
    detected = time.process_time() - began
    began = time.process_time()
    colours = pattern.row_colouring.number
    coloured = time.process_time() - began
    print(f"n = {n}: {pattern}, detected in {detected:.2f} s, {colours} colours in {coloured:.3f} s")

    def layer(linear_solver: inv.linear.LinearSolver, hand_over: bool) -> Tensor:
        @inv.implicit_function(conditions=f, adjoint=Implicit(linear_solver=linear_solver))
        def solve(_theta: Tensor) -> Tensor | tuple[Tensor, Factor]:
            return (solution, last) if hand_over else solution

        return solve(theta)

    solution, last = newton(linear, theta.detach())
    before = peak()

    def backward(linear_solver: inv.linear.LinearSolver, hand_over: bool = False) -> Tensor:
        y = layer(linear_solver, hand_over)
        return torch.autograd.grad(y, theta, cotangent)[0]

    kept = layer(SparseLU(pattern), hand_over=False)
    handed = layer(SparseLU(pattern), hand_over=True)
    jacobian = assemble(linear, solution)
    exact = splu(jacobian)
    reference = exact.solve(cotangent.numpy(), "T")
    reference += exact.solve(cotangent.numpy() - jacobian.T @ reference, "T")
    reference = torch.from_numpy(reference)
    cases = {
        "floor: assemble J, splu, one solve": lambda: splu(assemble(linear, solution)).solve(
            cotangent.numpy(), "T"
        ),
        "layer alone, without backward": lambda: layer(SparseLU(pattern), False),
        "layer and backward, fresh factor": lambda: backward(SparseLU(pattern)),
        "layer and backward, factor handed over": lambda: backward(SparseLU(pattern), True),
        "backward alone, factor handed over": lambda: torch.autograd.grad(
            handed, theta, cotangent, retain_graph=True
        )[0],
        "backward alone, second cotangent": lambda: torch.autograd.grad(
            kept, theta, cotangent, retain_graph=True
        )[0],
        "floor, in the plugin's column order": lambda: splu(
            assemble(linear, solution), permc_spec="MMD_AT_PLUS_A", relax=1, panel_size=1
        ).solve(cotangent.numpy(), "T"),
        "one solve with the floor's factor": lambda: exact.solve(cotangent.numpy(), "T"),
    }
    compare(f"Nonlinear Poisson, n = {n}", cases, quick=quick)
    for name in ("layer and backward, fresh factor", "layer and backward, factor handed over"):
        error = (cases[name]() - reference).norm() / reference.norm()
        print(f"  {name}: relative error of the gradient {error:.1e}")
    print(f"  peak memory {before:.0f} -> {peak():.0f} MiB; a dense J alone: {n**2 * 8 / 2**20:.0f} MiB")


if __name__ == "__main__":
    quick = options().quick
    workload(32 if quick else 128, quick)
