"""Solutions and derivatives by other means than the engine's, to compare with.

Newton's method unrolled from y*: differentiating k steps taken from a root gives its derivatives up to
order k exactly, by plain autograd through the steps (Griewank & Walther 2008, chapter 15).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from invlayer_core.testing.zoo import Case

__all__ = ["derivatives", "nearest_root", "same", "unrolled_newton"]


def unrolled_newton(case: Case, y: Tensor, args: Sequence[Tensor], steps: int = 3) -> Tensor:
    """Newton steps on F from ``y``, recorded by autograd; exact to order ``steps``.

    Parameters
    ----------
    case : Case
    y : Tensor of shape ``(*batch, n)``
        Near a root.
    args : sequence of Tensor
        What to differentiate by, in place of the case's own.

    Returns
    -------
    Tensor of shape ``(*batch, n)``
    """
    with torch.enable_grad():
        y = y.detach().clone().requires_grad_()
        for _ in range(steps):
            residual = case.function(y, *args)
            rows = [
                torch.autograd.grad(residual[..., i].sum(), y, create_graph=True)[0]
                for i in range(y.shape[-1])
            ]
            y = y - torch.linalg.solve(torch.stack(rows, -2), residual.unsqueeze(-1)).squeeze(-1)
    return y


def nearest_root(case: Case, y: Tensor) -> Tensor:
    """The root of F that Newton's method finds from ``y``, in float64."""
    precise = case.to(torch.float64)
    return unrolled_newton(precise, y.double(), precise.args, steps=8).detach()


def derivatives(
    layer: Callable[..., Tensor], args: Sequence[Tensor], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """First and second derivatives of a layer, along random directions.

    Parameters
    ----------
    layer : callable
        ``layer(*args) -> y``.
    args : sequence of Tensor
        Leaves that require grad.

    Returns
    -------
    first : list of Tensor
        ∇ of ⟨w, y²⟩, one per arg; the square gives second derivatives to a y that is linear in args.
    second : list of Tensor
        ∇ of ⟨v, first⟩, one per arg.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda like: torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.5  # noqa: E731
    y = layer(*args)
    first = torch.autograd.grad((draw(y) * y * y).sum(), args, create_graph=True)
    second = torch.autograd.grad(torch.stack([(draw(g) * g).sum() for g in first]).sum(), args)
    return [g.detach() for g in first], list(second)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two results agree in shape and bit for bit, NaN with NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
