"""Solve J x = b or Jᵀ x = b with sparse factors, and certify what comes out.

A solution is measured by J as F itself pulls it back or pushes it forward, refined where that helps
(Higham 2002, chapter 12), and accepted if its residual is small beside b. Where J is so ill-conditioned that
it cannot be, the residual must be one that rounding explains, |r| ≲ eps |J| |x|, and x not so large that it
holds no digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError, PerformanceWarning, SingularJacobianError, warn_user
from invlayer_core.jacobians.compressed import check_explains, compressed_values, pull, push
from invlayer_core.jacobians.detection import probed_pattern
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.jacobians.pattern import SparsityPattern
from invlayer_core.linear.factor_bank import FactorBank, apply_factors, solve_with_values
from invlayer_core.linear.krylov import gmres
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.linear.sparse_singular import degenerate, is_large

__all__ = ["SparseSolve", "solve_sparse"]

_REFINEMENTS = 3
_KRYLOV_STEPS = 30  # with a factor that was handed over, before a fresh one is made
_UNNOTICED = 512  # unknowns up to which a detection costs little

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


@final
class _Candidate(NamedTuple):
    """x, b − A x, and the relative size of it, per sample."""

    x: Tensor
    missing: Tensor
    relative: Tensor


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
            f"the conditions give {equations} equations for {shape.size} unknowns; accepted with SparseLU are "
            "as many equations as unknowns. linear_solver=LU() with singular='lstsq' takes others."
        )
    pattern = problem.method.known_pattern
    if pattern is not None and pattern.shape != (equations, shape.size):
        raise ConditionsError(
            f"SparseLU(pattern={pattern}) came with conditions whose Jacobian is {equations} x {shape.size} "
            "per sample; accepted is the pattern of one system."
        )


def _certified(problem: SparseSolve, rhs: Tensor) -> Tensor:
    known = _without_values(problem, rhs)
    if known is not None and not _any(~_solved(problem, known) | is_large(known.x, rhs)):
        return known.x
    values = _values(problem)
    fresh = _refined(
        problem, rhs, lambda b: solve_with_values(problem.bank, problem.method, values, b, transpose=problem.transpose)
    )  # fmt: skip
    if known is not None:  # what was good stays as it is, to the last bit
        good = _solved(problem, known)
        fresh = _Candidate(*(_pick(good, old, new) for old, new in zip(known, fresh, strict=True)))
    return _decide(problem, rhs, values, fresh)


def _without_values(problem: SparseSolve, rhs: Tensor) -> _Candidate | None:
    """By factors that are there already: those of an earlier cotangent, or of the forward solve."""
    if _functorch.is_active():  # mapped dimensions may have come or gone since they were made
        return None
    bank, transpose = problem.bank, problem.transpose
    if bank.factors:
        return _refined(problem, rhs, lambda b: apply_factors(bank.factors, b, transpose=transpose))
    if len(bank.handed) != rhs.shape[-2] or rhs.ndim != 2:
        return None
    apply = lambda b: apply_factors(bank.handed, b, transpose=transpose)  # noqa: E731
    candidate = _by_krylov(problem, rhs, apply, _refined(problem, rhs, apply))
    poor = ~_solved(problem, candidate) & rhs.isfinite().all(-1)
    if _any(poor):
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


def _candidate(problem: SparseSolve, rhs: Tensor, x: Tensor) -> _Candidate:
    missing = rhs - problem.product(x)
    size = rhs.norm(dim=-1)
    return _Candidate(x, missing, missing.norm(dim=-1) / torch.where(size == 0, torch.ones_like(size), size))


def _refined(problem: SparseSolve, rhs: Tensor, apply: Apply) -> _Candidate:
    """Steps of refinement, each for those samples alone that need it, kept where it helps."""
    best, goal = _candidate(problem, rhs, apply(rhs)), torch.finfo(rhs.dtype).eps ** 0.8
    for _ in range(_REFINEMENTS):
        short = ~(best.relative <= goal)
        if not _any(short):
            break
        best, helped = _improved(problem, rhs, best, short, apply)
        if not _any(helped):
            break
    return best


def _improved(
    problem: SparseSolve, rhs: Tensor, best: _Candidate, short: Tensor, apply: Apply
) -> tuple[_Candidate, Tensor]:
    missing = torch.where(short.unsqueeze(-1), best.missing, torch.zeros_like(best.missing))
    tried = _candidate(problem, rhs, best.x + apply(missing))
    helped = short & (tried.relative < best.relative)
    return _Candidate(*(_pick(helped, new, old) for new, old in zip(tried, best, strict=True))), helped


def _by_krylov(problem: SparseSolve, rhs: Tensor, apply: Apply, best: _Candidate) -> _Candidate:
    """GMRES with the factor as preconditioner, from where refinement has come to."""
    short = ~_solved(problem, best)
    if not _any(short):
        return best

    def correct(missing: Tensor) -> Tensor:
        missing = torch.where(missing.isfinite(), missing, torch.zeros_like(missing))
        steps = {"rtol": 1e-8, "maxiter": _KRYLOV_STEPS, "restart": _KRYLOV_STEPS}
        return apply(gmres(lambda v: problem.product(apply(v)), missing, **steps).x)  # type: ignore[arg-type]

    for _ in range(2):
        best, helped = _improved(problem, rhs, best, short, correct)
        short = helped & ~_solved(problem, best)
        if not _any(short):
            break
    return best


def _solved(problem: SparseSolve, candidate: _Candidate) -> Tensor:
    return candidate.relative <= problem.method.tolerance(candidate.x.dtype)


def _pick(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask if mask.ndim == chosen.ndim else mask.unsqueeze(-1), chosen, other)


def _any(mask: Tensor) -> bool:
    return bool(_functorch.plain(mask).any())


def _decide(problem: SparseSolve, rhs: Tensor, values: Tensor, candidate: _Candidate) -> Tensor:
    good = _solved(problem, candidate) | _is_rounding(problem, rhs, values, candidate)
    if _any(is_large(candidate.x, rhs)):
        apply = lambda b, transpose: solve_with_values(  # noqa: E731
            problem.bank, problem.method, values, b, transpose=transpose
        )
        good = good & ~degenerate(problem.linearization, candidate.x, rhs, apply, transpose=problem.transpose)
    # NaN in the right-hand side says nothing of J, and goes on as it does in all of torch.
    failed = ~good & rhs.isfinite().all(-1)
    if not _any(failed):
        return candidate.x
    if problem.singular == "raise":
        raise _singular(problem, _functorch.plain(failed), _functorch.plain(candidate.relative))
    answer = torch.full_like(candidate.x, torch.nan if problem.singular == "nan" else 0.0)
    return _pick(failed, answer, candidate.x)


def _is_rounding(problem: SparseSolve, rhs: Tensor, values: Tensor, candidate: _Candidate) -> Tensor:
    """Whether rounding explains the residual, and x is not so large that rounding is all there is."""
    pattern = problem.bank.pattern
    assert pattern is not None
    rows, cols = pattern.rows.to(rhs.device), pattern.cols.to(rhs.device)
    to, source = (cols, rows) if problem.transpose else (rows, cols)
    sizes = torch.zeros_like(rhs).index_add(-1, to, values.abs() * candidate.x.abs()[..., source])
    eps, most = torch.finfo(rhs.dtype).eps, int(to.bincount().max()) if to.numel() else 1
    explained = candidate.missing.abs().amax(-1) <= 100.0 * most * eps * (sizes + rhs.abs()).amax(-1)
    return explained & (sizes.amax(-1) <= 1e-2 / eps * rhs.abs().amax(-1))


def _singular(problem: SparseSolve, failed: Tensor, relative: Tensor) -> SingularJacobianError:
    count = problem.linearization.system.shape.count
    bad = failed.reshape(-1, count).any(0).nonzero().flatten().tolist()
    worst = relative.reshape(-1, count).amax(0)
    shown = ", ".join(f"sample {i} (relative residual {float(worst[i]):.1e})" for i in bad[:5])
    name = problem.method.solver if isinstance(problem.method.solver, str) else type(problem.method.solver).__name__
    return SingularJacobianError(
        f"SparseLU with {name} found the Jacobian of the conditions singular at the solution of {shown}"
        f"{' and more' if len(bad) > 5 else ''}, of {count} samples: y is not a differentiable function of the "
        "args there, or J is too ill-conditioned to tell. Accepted are regular samples; or choose what a "
        "singular one should give: adjoint=Implicit(singular='nan' | 'zero'), or 'lstsq' and 'damped' with "
        "linear_solver=LU()."
    )
