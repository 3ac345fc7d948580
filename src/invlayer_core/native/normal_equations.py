"""The normal equations JᵀJ d = Jᵀr of a least-squares step: formed where they are small, else by products.

Formed, they are n × n numbers and one batched Cholesky factorisation, to which the units of the unknowns do
not matter (van der Sluis 1969). By products they are J v and Jᵀu alone, and conjugate gradients: of a step
that the next one corrects anyway, three digits are enough (Dembo, Eisenstat & Steihaug, Inexact Newton
methods, SIAM J. Numer. Anal. 19, 1982). The diagonal of JᵀJ, by which dense steps are damped, is then not
known; its mean is: ‖Jᵀz‖² / n, for z of random signs (Hutchinson 1990).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core.solvers import BatchProblem
from invlayer_core.solvers.iterations import may_have
from invlayer_core.solvers.problem import Products

__all__ = ["Gram", "NormalProducts", "column_lengths", "promised", "solve_normal", "times"]

_HOST_EVERY = 10  # products on an accelerator between two questions whether all samples are done


@final
@dataclass(frozen=True)
class NormalProducts:
    """JᵀJ of every sample at ``y``, known by its products.

    Attributes
    ----------
    problem : BatchProblem
    y : Tensor of shape ``(B, n)``
    products : Products
        Those of J there.
    mean : Tensor of shape ``(B, 1)``
        About that of the diagonal of JᵀJ.
    rtol, maxiter
        Of conjugate gradients.
    """

    problem: BatchProblem
    y: Tensor
    products: Products
    mean: Tensor
    rtol: float
    maxiter: int

    @classmethod
    def at(cls, problem: BatchProblem, y: Tensor, rtol: float, maxiter: int) -> NormalProducts:
        """From one evaluation of the residuals at ``y``."""
        products = problem.products(y, "residuals")
        steps = torch.arange(1, products.value.shape[-1] + 1, dtype=y.dtype, device=y.device)
        signs = torch.where((7.0 * steps.sqrt()).frac() < 0.5, 1.0, -1.0).to(y)
        square = products.pull(signs.expand_as(products.value)).square()
        return cls(problem, y, products, square.mean(-1, keepdim=True), rtol, maxiter)

    def elsewhere(self, y: Tensor) -> NormalProducts:
        """The same at another point."""
        return self.at(self.problem, y, self.rtol, self.maxiter)

    @property
    def slope(self) -> Tensor:
        """Jᵀr."""
        return self.products.pull(self.products.value)

    def times(self, v: Tensor) -> Tensor:
        """JᵀJ v."""
        return self.products.pull(self.products.push(v))

    def solve(self, slope: Tensor, damping: Tensor | None) -> Tensor:
        """d with (JᵀJ + λ D) d = ``slope`` to ``rtol``, D the mean of the diagonal; Hestenes & Stiefel 1952.

        A sample that is done stands still, so that it does not matter how long others take.
        """
        push, pull = self.products.push, self.products.pull
        shift = torch.zeros_like(self.mean) if damping is None else damping.unsqueeze(-1) * self.mean
        step, left, along = torch.zeros_like(slope), slope, slope
        square = first = slope.square().sum(-1, keepdim=True)
        active = square > 0
        for k in range(1, self.maxiter + 1):
            pushed = push(along)
            curvature = pushed.square().sum(-1, keepdim=True) + shift * along.square().sum(-1, keepdim=True)
            active = active & (curvature > 0)  # 0 where J does not see the direction
            share = torch.where(active, square / curvature, 0.0)
            step = step + share * along
            left = left - torch.where(active, share * (pull(pushed) + shift * along), 0.0)
            before, square = square, left.square().sum(-1, keepdim=True)
            active = active & (square > self.rtol**2 * first)
            if (slope.is_cpu or k % _HOST_EVERY == 0) and not bool(active.any()):
                break
            along = torch.where(active, left + square / before * along, along)
        return step


Gram = Tensor | NormalProducts
"""JᵀJ of every sample: ``(B, n, n)``, or its products."""


def times(gram: Gram, v: Tensor) -> Tensor:
    """JᵀJ v, ``(B, n)``."""
    if isinstance(gram, NormalProducts):
        return gram.times(v)
    return (gram @ v.unsqueeze(-1)).squeeze(-1)


def column_lengths(gram: Gram) -> Tensor:
    """Those of the columns of J, or one for all, which broadcasts; 1 where they are 0."""
    square = gram.mean if isinstance(gram, NormalProducts) else _diagonal(gram)
    lengths = square.sqrt()
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def solve_normal(gram: Gram, slope: Tensor, damping: Tensor | None = None) -> Tensor:
    """d with (JᵀJ + λ D) d = Jᵀr, where D = diag(JᵀJ); with λ = 1 where that has no solution."""
    if isinstance(gram, NormalProducts):
        return gram.solve(slope, damping)
    matrix = gram
    if damping is not None:
        matrix = gram + torch.diag_embed(damping.unsqueeze(-1) * _diagonal(gram))
    lower, info = torch.linalg.cholesky_ex(matrix)
    if may_have(info > 0):
        more = torch.diag_embed(torch.where(_diagonal(gram) > 0, _diagonal(gram), 1.0))
        matrix = torch.where((info > 0)[:, None, None], torch.nan_to_num(gram) + more, matrix)
        lower, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(slope.unsqueeze(-1), lower).squeeze(-1)


@torch.no_grad()
def promised(gram: Gram, slope: Tensor, step: Tensor) -> Tensor:
    """By how much the model's ‖r‖² falls on the step: 2 ⟨Jᵀr, d⟩ − dᵀJᵀJ d."""
    return (step * (2 * slope - times(gram, step))).sum(-1)


def _diagonal(gram: Tensor) -> Tensor:
    return gram.detach().diagonal(dim1=-2, dim2=-1)
