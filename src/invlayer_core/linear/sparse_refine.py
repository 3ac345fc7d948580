"""Refinement of a solution by the products of F itself, and by GMRES with the factor as preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.jacobians.compressed import pull, push
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.linear.factor_bank import FactorBank, solve_with_values
from invlayer_core.linear.krylov import gmres
from invlayer_core.linear.sparse_lu import SparseLU

__all__ = ["Candidate", "SparseSolve", "any_of", "by_krylov", "is_solved", "pick", "refined"]

_REFINEMENTS = 3
_KRYLOV_STEPS = 30  # with a factor that was handed over, before a fresh one is made

Apply = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class SparseSolve:
    """One linear solve per sample.

    Attributes
    ----------
    linearization : Linearization
        Of the conditions whose Jacobian is J.
    method : SparseLU
    bank : FactorBank
    transpose : bool
    singular : {"raise", "nan", "zero"}
        What a sample gives that cannot be solved.
    exempt : Tensor of bool, shape ``(B,)``, or None
        Samples that get their right-hand side back: their answer has been decided.
    """

    linearization: Linearization
    method: SparseLU
    bank: FactorBank
    transpose: bool
    singular: str
    exempt: Tensor | None

    def product(self, vectors: Tensor) -> Tensor:
        """J or Jᵀ, as F gives it, times ``(..., B, n)``."""
        multiply = pull if self.transpose else push
        if vectors.ndim == 2:
            return multiply(self.linearization, vectors)
        flat = vectors.reshape(-1, *vectors.shape[-2:])
        return torch.stack([multiply(self.linearization, each) for each in flat]).reshape(vectors.shape)

    def apply(self, values: Tensor, rhs: Tensor, *, transpose: bool | None = None) -> Tensor:
        """Solve by the factors of these values, with the system at hand or with a given orientation."""
        transpose = self.transpose if transpose is None else transpose
        return solve_with_values(self.bank, self.method, values, rhs, transpose=transpose)


@final
class Candidate(NamedTuple):
    """x, b − A x, and the relative size of it, per sample."""

    x: Tensor
    missing: Tensor
    relative: Tensor


def _candidate(problem: SparseSolve, rhs: Tensor, x: Tensor) -> Candidate:
    missing = rhs - problem.product(x)
    size = rhs.norm(dim=-1)
    return Candidate(x, missing, missing.norm(dim=-1) / torch.where(size == 0, torch.ones_like(size), size))


def refined(problem: SparseSolve, rhs: Tensor, apply: Apply) -> Candidate:
    """Steps of refinement, each for those samples alone that need it, kept where it helps."""
    best, goal = _candidate(problem, rhs, apply(rhs)), torch.finfo(rhs.dtype).eps ** 0.8
    for _ in range(_REFINEMENTS):
        short = ~(best.relative <= goal)
        if not any_of(short):
            break
        best, helped = _improved(problem, rhs, best, short, apply)
        if not any_of(helped):
            break
    return best


def _improved(
    problem: SparseSolve, rhs: Tensor, best: Candidate, short: Tensor, apply: Apply
) -> tuple[Candidate, Tensor]:
    missing = torch.where(short.unsqueeze(-1), best.missing, torch.zeros_like(best.missing))
    tried = _candidate(problem, rhs, best.x + apply(missing))
    helped = short & (tried.relative < best.relative)
    return Candidate(*(pick(helped, new, old) for new, old in zip(tried, best, strict=True))), helped


def by_krylov(problem: SparseSolve, rhs: Tensor, apply: Apply, best: Candidate) -> Candidate:
    """GMRES with the factor as preconditioner, from where refinement has come to."""
    short = ~is_solved(problem, best)
    if not any_of(short):
        return best

    steps = min(_KRYLOV_STEPS, rhs.shape[-1])

    def correct(missing: Tensor) -> Tensor:
        # The same number of steps for every sample, and no NaN: a batch must not change its samples' bits.
        finite = torch.nan_to_num(missing, 0.0, 0.0, 0.0)
        space = {"maxiter": steps, "restart": steps, "check_every": steps}
        return apply(gmres(preconditioned, finite, rtol=1e-8, **space).x)

    def preconditioned(vectors: Tensor) -> Tensor:
        return torch.nan_to_num(problem.product(apply(vectors)), 0.0, 0.0, 0.0)

    for _ in range(2):
        best, helped = _improved(problem, rhs, best, short, correct)
        short = helped & ~is_solved(problem, best)
        if not any_of(short):
            break
    return best


def is_solved(problem: SparseSolve, candidate: Candidate) -> Tensor:
    """Samples ``(..., B)`` whose residual is small beside their right-hand side."""
    return candidate.relative <= problem.method.tolerance(candidate.x.dtype)


def pick(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """``where``, with a mask of samples for vectors or scalars."""
    return torch.where(mask if mask.ndim == chosen.ndim else mask.unsqueeze(-1), chosen, other)


def any_of(mask: Tensor) -> bool:
    """Whether any is True, whatever transform is running."""
    return bool(_functorch.plain(mask).any())
