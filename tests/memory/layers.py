"""The layers whose memory and cost are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv


def rand(*shape: int) -> Tensor:
    """Between 0.5 and 1.5, always the same; with gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def cubic(y: Tensor, x: Tensor) -> Tensor:
    return y + y**3 - x


def cubic_root(x: Tensor) -> Tensor:
    """Cardano's formula: a solver that is never differentiated."""
    root = torch.sqrt(x**2 / 4 + 1 / 27)
    return (x / 2 + root) ** (1 / 3) - (root - x / 2) ** (1 / 3)


class Weighted(torch.nn.Module):
    """Conditions with a parameter of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(rand(2, 2).detach())

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + 0.2 * torch.tanh(y @ self.weight) - x


class Picard(inv.Solver):
    """A per-sample NumPy solver that can be told to raise."""

    def __init__(self, raises_in: int | None = None) -> None:
        self.raises_in = raises_in

    def solve(self, problem: inv.SampleProblem, y0: np.ndarray, options: Any) -> inv.SolverResult:
        if problem.index == self.raises_in:
            raise FloatingPointError("overflow")
        y = y0
        for _ in range(6):
            y = y - np.linalg.solve(problem.jacobian(y), problem.residual(y))
        return inv.SolverResult(y=y)


class Breakdown(inv.Solver):
    """A batched solver that raises."""

    batched = True

    def solve(self, problem: inv.BatchProblem, y0: Tensor, options: Any) -> inv.SolverResult:
        raise FloatingPointError("overflow")


def near(x: Tensor) -> Tensor:
    """A guess that Newton's method needs few steps from."""
    return torch.full_like(x, 0.6).detach()


def newton(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return inv.root(f, near(x), x)


def opaque(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return inv.implicit_function(f)(cubic_root)(x)


def matrix_free(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.GMRES())
    return inv.implicit_function(f, adjoint=adjoint)(cubic_root)(x)


def failing(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Sample 1 is a lie of the solver."""
    lie = torch.zeros_like(x).detach()
    lie[1] = 1.0
    y = inv.implicit_function(f, on_failure="zero_grad")(lambda x: cubic_root(x) + lie)(x)
    assert bool((y[1] - lie[1] > 0).all())
    return y


def not_finite(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Sample 1 comes out as NaN, by ``on_failure``."""
    lie = torch.zeros_like(x).detach()
    lie[1] = 1.0
    y = inv.implicit_function(f, on_failure="nan")(lambda x: cubic_root(x) + lie)(x)
    return torch.where(y.isfinite(), y, 0.0)


def serial(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return inv.root(f, near(x), x, solver=Picard(), batch="serial")


def lockstep(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return inv.root(f, near(x), x, solver=Picard(), batch="lockstep")


LAYERS = {
    layer.__name__: layer for layer in (newton, opaque, matrix_free, failing, not_finite, serial, lockstep)
}
