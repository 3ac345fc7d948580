"""``torch.anderson``: Anderson acceleration of a fixed-point iteration, for a whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.linear.lu import lu_factor, lu_solve
from invlayer_core.native import iterative
from invlayer_core.native.iterative import IterativeSolver, pick
from invlayer_core.solvers.contract import BatchProblem

__all__ = ["Anderson"]

_WORSE = 10.0  # a residual that grows by more sends the sample back
_PATIENCE = 50  # evaluations without progress
_PROGRESS = 0.99


@final
@dataclass(frozen=True)
class _Options(iterative.Options):
    """``options=`` of ``torch.anderson``.

    maxiter : most evaluations of F. memory : how many differences are kept; 0 is plain iteration.
    damping : the share β of the residual that a step takes. ftol : a sample has converged once
    ‖F‖∞ ≤ ftol · (1 + ‖y‖∞); the default is eps^0.75. ridge : Tikhonov parameter of the mixing, beside
    differences of length 1.
    """

    maxiter: int = 500
    memory: int = 5
    damping: float = 1.0
    ftol: float | None = None
    ridge: float = 1e-12


@final
@dataclass(frozen=True)
class _State(iterative.State):
    """The last point, ``y``, with its residual; the next to try; and the differences that went before."""

    residual: Tensor
    size: Tensor  # ‖F(y)‖
    moves: Tensor  # (B, m, n): differences of y, each over the length of that of F
    changes: Tensor  # (B, m, n): differences of F, of length 1; 0 where there is none
    count: Tensor  # how many there were
    share: Tensor  # β
    best: Tensor
    waiting: Tensor


@final
class Anderson(IterativeSolver):
    """Anderson mixing of type II: y ← y + βF − (ΔY + βΔF) γ, with the γ that makes ‖F − ΔF γ‖ least.

    For a fixed point F = T(y) − y, so that without memory it is plain iteration. For a root F does not say
    where to go: the first step is a short one against F, and its difference tells the rest. A sample whose
    residual grows tenfold goes back, forgets, and takes half the β.

    References
    ----------
    Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12 (1965). Walker & Ni, Anderson
    acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011).
    """

    name: ClassVar[str] = "torch.anderson"
    Options: ClassVar[type[iterative.Options]] = _Options

    def start(self, problem: BatchProblem, y0: Tensor, options: _Options) -> _State:
        size = y0.shape[1]
        none = torch.zeros(y0.shape[0], dtype=torch.bool, device=y0.device)
        far = torch.full(none.shape, torch.inf, dtype=y0.dtype, device=y0.device)
        history = y0.new_zeros(y0.shape[0], min(options.memory, size), size)
        return _State(
            y=y0, converged=none, failed=none, trial=y0, residual=torch.zeros_like(y0), size=far,
            moves=history, changes=history, count=none.long(), share=torch.zeros_like(far), best=far,
            waiting=none.long(),
        )  # fmt: skip

    def step(self, problem: BatchProblem, state: _State, options: _Options) -> _State:
        residual = problem.residual(state.trial)
        size = residual.detach().norm(dim=-1)
        first = state.size == torch.inf
        accepted = size <= _WORSE * state.size  # False for NaN
        state = _with_difference(state, residual, accepted & ~first)
        y, residual = pick(accepted, state.trial, state.y), pick(accepted, residual, state.residual)
        share = torch.where(first, _first_share(problem.kind, y, size, options), state.share)
        share = torch.where(accepted, share, share / 2)
        flat = residual.detach().abs().amax(-1) <= _ftol(options, y) * (1 + y.detach().abs().amax(-1))
        converged = accepted & flat
        progress = size < _PROGRESS * state.best
        waiting = torch.where(progress, 0, state.waiting + 1)
        failed = ~converged & ((first & ~accepted) | (waiting > _PATIENCE))
        trial = _mixed(state, y, residual, share, options)
        if problem.kind == "fixed_point":  # T(y) is nearer still
            y = pick(converged, y + residual, y)
        return dataclasses.replace(
            state, y=y, converged=converged, failed=failed, residual=residual, share=share,
            trial=pick(converged | failed, y, trial),
            size=torch.where(accepted, size, state.size),
            best=torch.where(progress, size, state.best),
            waiting=waiting,
        )  # fmt: skip

    def near(self, options: _Options) -> _Options:
        return dataclasses.replace(options, memory=0)  # of differences between rounding errors

    def iterate(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any], steps: int) -> Tensor:
        if problem.kind != "fixed_point":
            raise ConditionsError(
                f"{self.name}: iterations from a solution of kind {problem.kind!r} lead nowhere, as F does "
                "not say where to go. Accepted is fixed_point; for a root take solver='torch.newton', or "
                "adjoint=Unrolled() or Implicit()."
            )
        settings = self.near(self._read(options))
        y = y0
        for _ in range(steps):
            y = y + settings.damping * problem.residual(y)
        return y


def _ftol(options: _Options, y: Tensor) -> float:
    return torch.finfo(y.dtype).eps ** 0.75 if options.ftol is None else options.ftol


def _first_share(kind: str, y: Tensor, size: Tensor, options: _Options) -> Tensor:
    """β: for a root negative, and no more than makes the first step a tenth of y."""
    if kind == "fixed_point":
        return torch.full_like(size, options.damping)
    length = 0.1 * torch.maximum(y.detach().norm(dim=-1), torch.ones_like(size))
    return -options.damping * torch.minimum(length / size, torch.ones_like(size))


def _with_difference(state: _State, residual: Tensor, accepted: Tensor) -> _State:
    """The history with one more difference, in place of the oldest; forgotten where a sample went back."""
    memory = state.moves.shape[1]
    if memory == 0:
        return state
    change = residual - state.residual
    usable = accepted & (change.detach() != 0).any(-1)
    length = pick(usable, change, torch.ones_like(change)).norm(dim=-1, keepdim=True)
    slot = torch.arange(memory, device=change.device) == (state.count % memory).unsqueeze(-1)
    here = (slot & usable.unsqueeze(-1)).unsqueeze(-1)
    back = ~(accepted | (state.size == torch.inf))
    return dataclasses.replace(
        state,
        moves=pick(
            back, torch.zeros_like(state.moves),
            torch.where(here, ((state.trial - state.y) / length).unsqueeze(1), state.moves),
        ),
        changes=pick(
            back, torch.zeros_like(state.changes),
            torch.where(here, (change / length).unsqueeze(1), state.changes),
        ),
        count=torch.where(back, 0, state.count + usable),
    )  # fmt: skip


def _mixed(state: _State, y: Tensor, residual: Tensor, share: Tensor, options: _Options) -> Tensor:
    """The next point."""
    plain = y + share.unsqueeze(-1) * residual
    memory = state.moves.shape[1]
    if memory == 0:
        return plain
    filled = torch.arange(memory, device=y.device) < state.count.unsqueeze(-1)
    ridge = torch.where(filled, options.ridge, 1.0).to(y.dtype)
    gram = state.changes @ state.changes.mT + torch.diag_embed(ridge)
    target = (state.changes @ residual.unsqueeze(-1)).squeeze(-1)
    weights = lu_solve(gram, target, lu_factor(gram.detach()))
    correction = state.moves + share.reshape(-1, 1, 1) * state.changes
    return plain - (weights.unsqueeze(-2) @ correction).squeeze(-2)
