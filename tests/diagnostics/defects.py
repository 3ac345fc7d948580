"""Layers with one defect each, and what a diagnosis has to find in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv

SHAPE = (4, 3)


def cubic(y: Tensor, a: Tensor) -> Tensor:
    return y**3 + y - a


def batch_of_a(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1.0 + torch.rand(*(shape or SHAPE), generator=generator, dtype=torch.float64)


def newton(a: np.ndarray, steps: int = 20) -> np.ndarray:
    y = np.zeros_like(a)
    for _ in range(steps):
        y = y - (y**3 + y - a) / (3 * y**2 + 1)
    return y


def exact(a: Tensor) -> Tensor:
    return torch.from_numpy(newton(a.detach().numpy()))


def solve_exactly(_y0: Tensor, a: Tensor) -> Tensor:
    return exact(a)


@inv.implicit_function(conditions=cubic, atol=1e-3)
def noisy_solver(a: Tensor) -> Tensor:
    """Right to 3e-7, like a solver that stops at a tolerance: the error jumps with every bit of the input."""
    bits = a.detach().numpy().view(np.int64)
    jitter = ((bits * 2654435761) % 1000003) / 1000003 - 0.5
    return exact(a) + torch.from_numpy(1e-6 * jitter)


@inv.implicit_function(conditions=cubic, atol=1e-2)
def early_solver(a: Tensor) -> Tensor:
    """Four Newton steps: a smooth function of the input, and not yet the root."""
    return torch.from_numpy(newton(a.detach().numpy(), steps=4))


@inv.implicit_function(conditions=lambda y, a, b: y**3 + y - a * b.detach())
def forgets_b(a: Tensor, b: Tensor) -> Tensor:
    """The conditions hold, and do not say that the solution depends on b."""
    return exact(a * b)


def wrong_declared_jacobian(a: Tensor) -> Tensor:
    """∂f/∂y is 3y² + 1; nothing can be measured."""
    return inv.inverse(a, exact, jacobian=lambda y: torch.diag_embed(2 * y**2 + 1))


class Cubic(torch.autograd.Function):
    """A hand-written derivative, and a right one; its JVP too."""

    factor = 1.0
    sample: int | None = None

    @classmethod
    def slope(cls, y: Tensor) -> Tensor:
        slope = 1 / (3 * y**2 + 1)
        wrong = torch.ones_like(slope)
        wrong[slice(None) if cls.sample is None else cls.sample] = cls.factor
        return slope * wrong

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return exact(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @classmethod
    def backward(cls, ctx: Any, cotangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return cotangent * cls.slope(y)


class WrongEverywhere(Cubic):
    factor = 1.3


class WrongInOneSample(Cubic):
    factor = 1.3
    sample = 2


class WrongInForwardMode(Cubic):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 1.1 * tangent / (3 * y**2 + 1)


class OnceDifferentiable(Cubic):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return cotangent / (3 * y**2 + 1)


class BackwardWithoutGraph(Cubic):
    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return cotangent.detach() / (3 * y.detach() ** 2 + 1)


class FrozenSlope(Cubic):
    """A second derivative, but only a part of it: the slope is taken as a constant times a."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        a, y = ctx.saved_tensors
        y = y.detach()
        return cotangent * a / a.detach() / (3 * y**2 + 1)


class Asymmetric(torch.autograd.Function):
    """∇ of ½ Σ a², whose Hessian is made up."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return 0.5 * a.square().sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        rolled = a.reshape(-1).roll(1)
        return cotangent * (a + (rolled - rolled.detach()).reshape(a.shape))


def one_newton_step(a: Tensor) -> Tensor:
    """The well-known recipe: first derivatives right, second ones silently wrong."""
    y = exact(a)
    return y - cubic(y, a) / (3 * y**2 + 1)


def one_live_newton_step(a: Tensor) -> Tensor:
    """The same from a y that knows of a: a second derivative that is not zero, and still wrong."""
    y = exact(a) + 0 * a
    y = y + (a - a.detach()) * 0.5 * a.detach()
    return y.detach() - cubic(y.detach(), a) / (3 * y.detach() ** 2 + 1 + 0.5 * (a - a.detach()))


def coupled_network() -> torch.nn.Module:
    """BatchNorm in train mode before a layer: right derivatives, but not of samples."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3).double()

        def forward(self, a: Tensor) -> Tensor:
            return inv.root(cubic, torch.zeros_like(a), args=self.norm(a), solver=solve_exactly)

    return Network()


def coupled_conditions(a: Tensor) -> Tensor:
    """Conditions that mix samples: there are no Jacobians per sample."""
    mixing = lambda y, a: y**3 + y - a + 0.1 * y.mean(0)  # noqa: E731
    return inv.root(mixing, torch.zeros_like(a), args=a, solver=_coupled_solver)


def _coupled_solver(y: Tensor, a: Tensor) -> Tensor:
    for _ in range(200):
        y = y - (y**3 + y - a + 0.1 * y.mean(0)) / (3 * y**2 + 1.1)
    return y


def ill_conditioned(a: Tensor) -> Tensor:
    """Sample 2 has κ ≈ 1e11, whatever the units of its equations."""
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    small = torch.ones(a.shape[0], 1, dtype=torch.float64)
    small[2] = 1e-11

    def conditions(y: Tensor, a: Tensor) -> Tensor:
        skewed = (y @ turn) * torch.cat([torch.ones_like(small), small], -1)
        return skewed @ turn.mT / 2 - a

    def solve(_y: Tensor, a: Tensor) -> Tensor:
        return ((a @ turn) / torch.cat([torch.ones_like(small), small], -1)) @ turn.mT / 2

    return inv.root(conditions, torch.zeros_like(a), args=a, solver=solve, rtol=1e-3, atol=1e-3)


def singular(a: Tensor) -> Tensor:
    """y² = a at a = 0 in sample 1: a double root."""

    def solve(_y: Tensor, a: Tensor) -> Tensor:
        return a.clamp_min(0).sqrt()

    return inv.root(lambda y, a: y**2 - a, torch.ones_like(a), args=a, solver=solve)


def stateful() -> Callable[[Tensor], Tensor]:
    """Adds a little more at every call."""
    calls = itertools.count()
    return lambda a: (
        inv.root(cubic, torch.zeros_like(a), args=a, solver=solve_exactly) * (1 + 1e-5 * next(calls))
    )


def detached(a: Tensor) -> Tensor:
    return exact(a)
