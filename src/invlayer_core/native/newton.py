"""``torch.newton``: Newton's method for a whole batch, with a line search per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.linear.lu import lu_factor, lu_solve
from invlayer_core.solvers.contract import BatchProblem, Solver, SolverResult

__all__ = ["Newton"]


@final
@dataclass(frozen=True)
class _Options:
    """``options=`` of ``torch.newton``.

    maxiter : most Newton steps. xtol : a sample has converged once its step is shorter than
    ``xtol * max|y|``; as the error is then about the square of it, the default is eps^0.55.
    backtracks : how often a step may be halved.
    """

    maxiter: int = 100
    xtol: float | None = None
    backtracks: int = 10


@final
class Newton(Solver):
    """Batched Newton–Raphson with backtracking on ‖F‖, and a Levenberg–Marquardt step where J fails.

    Every sample follows its own path: what one does never changes another's.

    References
    ----------
    Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations (1983),
    algorithms 6.1.3 and 6.5.1.
    """

    batched = True

    def solve(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        settings = _read_options(options)
        xtol = torch.finfo(y0.dtype).eps ** 0.55 if settings.xtol is None else settings.xtol
        y, residual = y0, problem.residual(y0)
        active = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
        converged = torch.zeros_like(active)
        iterations = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
        for _ in range(settings.maxiter):
            step, regular = _step(problem.jacobian(y), residual)
            y, residual = _line_search(problem, y, residual, step, active, settings.backtracks)
            small = step.abs().amax(-1) <= xtol * y.abs().amax(-1)
            iterations += active
            converged |= active & ((small & regular) | (residual == 0).all(-1))
            active &= ~converged & y.isfinite().all(-1)
            if not bool(active.any()):
                break
        return SolverResult(y=y, success=converged, iterations=iterations, message=_message(settings))


def _read_options(options: Mapping[str, Any]) -> _Options:
    try:
        return _Options(**options)
    except TypeError:
        unknown = sorted(set(options) - set(_Options.__dataclass_fields__))
        raise TypeError(
            f"torch.newton: unknown options {unknown}; accepted are {sorted(_Options.__dataclass_fields__)}."
        ) from None


def _message(settings: _Options) -> str:
    return f"torch.newton with maxiter={settings.maxiter}."


def _step(blocks: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """J⁻¹F where that is finite, else a damped least-squares step; and where it was regular."""
    step = lu_solve(blocks, residual, lu_factor(blocks))
    regular = step.isfinite().all(-1)
    if not bool(regular.all()):
        step = torch.where(regular.unsqueeze(-1), step, _damped_step(blocks, residual))
    return step, regular


def _damped_step(blocks: Tensor, residual: Tensor) -> Tensor:
    """(JᵀJ + μI)⁻¹Jᵀ F with μ = ‖F‖‖J‖: between Gauss–Newton and steepest descent."""
    blocks, residual = torch.nan_to_num(blocks), torch.nan_to_num(residual)
    damping = residual.norm(dim=-1) * torch.linalg.matrix_norm(blocks) + torch.finfo(blocks.dtype).tiny ** 0.5
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    gram = blocks.mT @ blocks + damping[:, None, None] * identity
    return lu_solve(gram, (blocks.mT @ residual.unsqueeze(-1)).squeeze(-1), lu_factor(gram))


def _line_search(
    problem: BatchProblem, y: Tensor, residual: Tensor, step: Tensor, active: Tensor, backtracks: int
) -> tuple[Tensor, Tensor]:
    """Halve each sample's step until ‖F‖ falls; the last try is taken as it is. Returns y and F(y)."""
    before = residual.norm(dim=-1)
    scale = active.to(y.dtype)
    for attempt in range(backtracks + 1):
        moved = y - scale.unsqueeze(-1) * step
        new = problem.residual(moved)
        # Near the solution rounding decides whether ‖F‖ falls: a step that does not raise it is good.
        worse = active & ~(new.norm(dim=-1) <= before * (1 + 4 * torch.finfo(y.dtype).eps)) & (before > 0)
        if attempt == backtracks or not bool(worse.any()):
            break
        scale = torch.where(worse, scale / 2, scale)
    keep = active.unsqueeze(-1) & moved.isfinite() & new.isfinite().all(-1, keepdim=True)
    return torch.where(keep, moved, y), torch.where(keep, new, residual)
