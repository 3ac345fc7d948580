"""Which solutions are accepted, and what the others become."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import SingularJacobianError
from invlayer_core.linear.sparse_refine import Candidate, SparseSolve, any_of, is_solved, pick
from invlayer_core.linear.sparse_singular import degenerate, is_large

__all__ = ["decide"]


def decide(problem: SparseSolve, rhs: Tensor, values: Tensor, candidate: Candidate) -> Tensor:
    """The solutions ``(..., B, n)`` of regular samples, and the policy's answer for the others.

    Raises
    ------
    SingularJacobianError
        If there are others, and the policy is ``"raise"``.
    """
    good = is_solved(problem, candidate)
    if any_of(~good):
        good = good | _is_rounding(problem, rhs, values, candidate)
    if any_of(is_large(candidate.x, rhs)):

        def apply(vectors: Tensor, transpose: bool) -> Tensor:
            return problem.apply(values, vectors, transpose=transpose)

        good = good & ~degenerate(problem.linearization, candidate.x, rhs, apply, transpose=problem.transpose)
    # NaN in the right-hand side says nothing of J, and goes on as it does in all of torch.
    failed = ~good & rhs.isfinite().all(-1)
    if not any_of(failed):
        return candidate.x
    if problem.singular == "raise":
        raise _singular(problem, _functorch.plain(failed), _functorch.plain(candidate.relative))
    answer = torch.full_like(candidate.x, torch.nan if problem.singular == "nan" else 0.0)
    return pick(failed, answer, candidate.x)


def _is_rounding(problem: SparseSolve, rhs: Tensor, values: Tensor, candidate: Candidate) -> Tensor:
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
    name = (
        problem.method.solver
        if isinstance(problem.method.solver, str)
        else type(problem.method.solver).__name__
    )
    return SingularJacobianError(
        f"SparseLU with {name} found the Jacobian of the conditions singular at the solution of {shown}"
        f"{' and more' if len(bad) > 5 else ''}, of {count} samples: y is not a differentiable function of "
        "the args there, or J is too ill-conditioned to tell. Accepted are regular samples; or choose what a "
        "singular one should give: adjoint=Implicit(singular='nan' | 'zero'), or 'lstsq' and 'damped' with "
        "linear_solver=LU()."
    )
