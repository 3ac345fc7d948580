"""Solve J x = b or Jᵀ x = b with sparse factors, and certify what comes out.

A solution is measured by J as F itself pulls it back or pushes it forward, refined where that helps
(Higham 2002, chapter 12), and accepted if its residual is small beside b. Where J is so ill-conditioned that
it cannot be, the residual must be one that rounding explains, |r| ≲ eps |J| |x|, and x not so large that it
holds no digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError, PerformanceWarning, warn_user
from invlayer_core.jacobians.compressed import check_explains, compressed_values, known_entries
from invlayer_core.jacobians.detection import probed_pattern
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.jacobians.pattern import SparsityPattern
from invlayer_core.linear.factor_bank import apply_factors
from invlayer_core.linear.sparse_refine import (
    Candidate,
    SparseSolve,
    any_of,
    by_krylov,
    is_solved,
    pick,
    refined,
)
from invlayer_core.linear.sparse_singular import is_large
from invlayer_core.linear.sparse_verdict import decide

__all__ = ["SparseSolve", "solve_sparse"]

_UNNOTICED = 512  # unknowns up to which a detection costs little


@torch.no_grad()
def solve_sparse(problem: SparseSolve, rhs: Tensor) -> Tensor:
    """x with J x = rhs or Jᵀ x = rhs, ``(B, n)``, without gradient.

    Raises
    ------
    SingularJacobianError
        If a sample's solution cannot be certified, and ``singular`` is ``"raise"``.
    ConditionsError
        If J is not square, or the pattern misses entries of it.
    """
    _check_square(problem)
    levels = _functorch.levels_mapped_by_autograd(rhs)
    plain = _functorch.plain(rhs) if levels else rhs.detach()
    mask = None if problem.exempt is None else problem.exempt.unsqueeze(-1)
    regular = plain if mask is None else torch.where(mask, torch.zeros_like(plain), plain)
    x = _certified(problem, regular)
    x = x if mask is None else torch.where(mask, plain, x)
    return _functorch.map_again(x, levels)


def _check_square(problem: SparseSolve) -> None:
    shape = problem.linearization.system.shape
    equations = problem.linearization.value.numel() // max(1, shape.count)
    if equations != shape.size:
        raise ConditionsError(
            f"the conditions give {equations} equations for {shape.size} unknowns; accepted with SparseLU "
            "are as many equations as unknowns. linear_solver=LU() with singular='lstsq' takes others."
        )
    pattern = problem.method.known_pattern
    if pattern is not None and pattern.shape != (equations, shape.size):
        raise ConditionsError(
            f"SparseLU(pattern={pattern}) came with conditions whose Jacobian is {equations} x {shape.size} "
            "per sample; accepted is the pattern of one system."
        )


def _certified(problem: SparseSolve, rhs: Tensor) -> Tensor:
    known = _without_values(problem, rhs)
    if known is not None and not any_of(~is_solved(problem, known) | is_large(known.x, rhs)):
        return known.x
    values = _values(problem)
    fresh = refined(problem, rhs, lambda b: problem.apply(values, b))
    if known is not None:  # what was good stays as it is, to the last bit
        good = is_solved(problem, known)
        fresh = Candidate(*(pick(good, old, new) for old, new in zip(known, fresh, strict=True)))
    return decide(problem, rhs, values, fresh)


def _without_values(problem: SparseSolve, rhs: Tensor) -> Candidate | None:
    """By factors that are there already: those of an earlier cotangent, or of the forward solve."""
    if _functorch.is_active():  # mapped dimensions may have come or gone since they were made
        return None
    bank, transpose = problem.bank, problem.transpose
    if len(bank.factors) == rhs.shape[-2]:
        return refined(problem, rhs, lambda b: apply_factors(bank.factors, b, transpose=transpose))
    if len(bank.handed) != rhs.shape[-2] or rhs.ndim != 2:
        return None
    apply = lambda b: apply_factors(bank.handed, b, transpose=transpose)  # noqa: E731
    candidate = refined(problem, rhs, apply)
    given = torch.tensor([factor is not None for factor in bank.handed], device=rhs.device)
    if any_of(~is_solved(problem, candidate) & given):
        candidate = by_krylov(problem, rhs, apply, candidate)
    poor = ~is_solved(problem, candidate) & rhs.isfinite().all(-1) & given
    if any_of(poor):
        warn_user(_NOT_GOOD_ENOUGH.format(samples=poor.nonzero().flatten().tolist()[:5]), PerformanceWarning)
        bank.handed = ()
    return candidate


_NOT_GOOD_ENOUGH = (
    "the factor that the forward solve handed over does not solve the system of the derivative for samples "
    "{samples}, even refined: it is that of another matrix, or of a point too far from the solution. A fresh "
    "one is made, and the result is right; hand over the factor of the last step, or none."
)


def _values(problem: SparseSolve) -> Tensor:
    bank, linearization = problem.bank, problem.linearization
    if bank.pattern is None:
        bank.pattern = problem.method.known_pattern or _detected(linearization)
    values = known_entries(linearization, bank.pattern)
    if values is None:  # else the solution alone is certified, by the products of F
        values = compressed_values(linearization, bank.pattern)
        check_explains(linearization, bank.pattern, values, f"SparseLU(pattern={bank.pattern})")
    return values


def _detected(linearization: Linearization) -> SparsityPattern:
    pattern = probed_pattern(linearization)
    if pattern.shape[1] > _UNNOTICED:
        warn_user(
            f"SparseLU() has no pattern, and detected one of {pattern.nnz} entries for {pattern.shape[1]} "
            "unknowns; it will do so again in every call. Detect it once and pass it: "
            "SparseLU(pattern=inv.jacobians.detect_sparsity(f, y, args)).",
            PerformanceWarning,
        )
    return pattern
