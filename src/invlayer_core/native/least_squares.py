"""What the least-squares solvers share: the model at the last point, trial points, and when to stop.

Every iteration is one evaluation of r and J for all samples, at their trial points. A sample whose cost has
fallen moves there, and takes a new step of the model ½‖r − J d‖²; another stays, and takes a shorter one from
the model that it has. What it keeps of the model is JᵀJ and Jᵀr: n × n numbers, however many residuals; or,
where those would be too many, the products with J (``normal_equations.py``).

A sample has converged once the error that its step leaves is small. From the steps s₁, s₂ of a method that
gains a factor ρ = s₂/s₁ that error is about s₂ ρ / (1 − ρ), be the gain linear or better. It also has where
steps get no shorter and its model promises no more than rounding. Small operations are what a small problem
costs: on the CPU, where asking is cheap, the test ends early as long as all steps are long.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from invlayer_core.native import iterative
from invlayer_core.native.iterative import IterativeSolver, pick
from invlayer_core.native.normal_equations import Gram, NormalProducts
from invlayer_core.solvers.contract import BatchProblem
from invlayer_core.solvers.iterations import may_have, surely_all

__all__ = ["LeastSquares", "Options", "State"]

_PATIENCE = 16  # evaluations in which the cost has to fall by a hundredth, or the step to its half
_NEAR = 1e-3  # of y: a step that may be one of the last
_SMALL = 64  # unknowns of one sample, up to which it is not asked how many residuals there are
_LARGE = 1000  # from where on products are faster
_MOST = 2**30  # bytes of J and JᵀJ of all samples


@dataclass(frozen=True)
class Options(iterative.Options):
    """What every least-squares solver takes.

    maxiter : most evaluations of r and J. xtol : a sample has converged once the error that its step leaves
    is shorter than ``xtol * max|y|``; the default is eps^0.75. safeguard : whether steps that raise the cost
    are taken back; without, each iteration is a full step. matrix_free : whether steps are found by
    conjugate gradients on products with J, instead of by Cholesky on JᵀJ; None for more than 1000 unknowns,
    or where J and JᵀJ of the batch take more than 1 GiB. inner_rtol, inner_maxiter : how far, and how long.
    """

    xtol: float | None = None
    safeguard: bool = True
    matrix_free: bool | None = None
    inner_rtol: float = 1e-3
    inner_maxiter: int = 1000


@dataclass(frozen=True)
class State(iterative.State):
    """The last point, its model and the step from it; ``control`` is what shortens steps."""

    step: Tensor
    gram: Gram  # JᵀJ
    slope: Tensor  # Jᵀr
    cost: Tensor  # ‖r‖²
    length: Tensor  # of the step; 0 if it was taken back, and says nothing of a rate
    control: Tensor
    best: Tensor  # the cost some iterations ago
    longest: Tensor  # the length of the step then
    iteration: int


class LeastSquares(IterativeSolver):
    """A least-squares solver is a way to control its steps."""

    Options: ClassVar[type[iterative.Options]] = Options

    @abstractmethod
    def first_control(self, y: Tensor, gram: Gram, options: Any) -> Tensor:
        """The control of the first step, ``(B,)``."""

    @abstractmethod
    def next_control(
        self, state: Any, cost: Tensor, accepted: Tensor, all_accepted: bool, options: Any
    ) -> Tensor:
        """The control after the step of ``state`` led to this cost; see :meth:`model_step`."""

    @abstractmethod
    def model_step(
        self, gram: Gram, slope: Tensor, control: Tensor, all_accepted: bool, options: Any
    ) -> Tensor:
        """d, to be subtracted from y; ``all_accepted`` if it is known that every sample has moved."""

    def start(self, problem: BatchProblem, y0: Tensor, options: Any) -> State:
        none = torch.zeros(y0.shape[0], dtype=torch.bool, device=y0.device)
        far = torch.full(none.shape, torch.inf, dtype=y0.dtype, device=y0.device)
        zero, gram = torch.zeros_like(y0), self._gram(problem, y0, options)
        return State(
            y=y0, converged=none, failed=none, trial=y0, step=zero, gram=gram, slope=zero,
            cost=far, length=torch.zeros_like(far), control=far, best=far, longest=far, iteration=0,
        )  # fmt: skip

    def _gram(self, problem: BatchProblem, y0: Tensor, options: Any) -> Gram:
        """What the model is kept in, at y0; no more than a place for it where it is a matrix."""
        if _is_matrix_free(problem, y0, options):
            return NormalProducts.at(problem, y0, options.inner_rtol, options.inner_maxiter)
        return torch.diag_embed(torch.zeros_like(y0))

    def step(self, problem: BatchProblem, state: Any, options: Any) -> Any:
        gram: Gram
        if isinstance(state.gram, NormalProducts):
            gram = state.gram.elsewhere(state.trial) if state.iteration else state.gram
            residuals, slope = gram.products.value, gram.slope
        else:
            residuals, blocks = problem.linearized(state.trial, "residuals")
            transposed = blocks.mT
            gram, slope = transposed @ blocks, (transposed @ residuals.unsqueeze(-1)).squeeze(-1)
        cost = residuals.detach().square().sum(-1)
        if state.iteration and options.safeguard:  # near the solution rounding decides whether the cost falls
            accepted = cost <= state.cost * (1 + 16 * torch.finfo(cost.dtype).eps)
        else:
            accepted = cost < torch.inf
        all_accepted = surely_all(accepted)
        if state.iteration:
            control = self.next_control(state, cost, accepted, all_accepted, options)
        else:
            control = self.first_control(state.trial, gram, options)
        if all_accepted:
            y = state.trial
        else:
            y = pick(accepted, state.trial, state.y)
            gram = gram.elsewhere(y) if isinstance(gram, NormalProducts) else pick(accepted, gram, state.gram)
            slope, cost = pick(accepted, slope, state.slope), torch.where(accepted, cost, state.cost)
        step = self.model_step(gram, slope, control, all_accepted, options)
        length = step.detach().abs().amax(-1)
        new = type(state)(
            y=y, converged=state.converged, failed=state.failed, trial=y - step, step=step, gram=gram,
            slope=slope, cost=cost, length=length if all_accepted else torch.where(accepted, length, 0.0),
            control=control, best=state.best, longest=state.longest, iteration=state.iteration + 1,
        )  # fmt: skip
        return self._judged(state, new, length, accepted, all_accepted, options)

    def _judged(
        self, old: Any, new: Any, length: Tensor, accepted: Tensor, all_accepted: bool, options: Any
    ) -> Any:
        """The new state, with what has converged or given up."""
        converged = _converged(old, new, length, None if all_accepted else accepted, options)
        if converged is not None:
            new = dataclasses.replace(new, converged=converged, y=pick(converged, new.trial, new.y))
        if new.iteration == 1 and not all_accepted:
            new = dataclasses.replace(new, failed=~accepted, trial=pick(accepted, new.trial, new.y))
        elif new.iteration % _PATIENCE == 0:
            gained = (new.cost < 0.99 * new.best) | (accepted & (length < 0.5 * new.longest))
            failed = ~new.converged & ~gained
            trial = pick(failed, new.y, new.trial)
            new = dataclasses.replace(new, failed=failed, trial=trial, best=new.cost, longest=length)
        return new

    def describe(self, state: Any, options: Any) -> str:
        how = super().describe(state, options)
        if not isinstance(state.gram, NormalProducts):
            return how
        return f"{how}; matrix-free: steps by conjugate gradients to {options.inner_rtol:g}"

    def near(self, options: Any) -> Any:
        return dataclasses.replace(options, safeguard=False)


def _is_matrix_free(problem: BatchProblem, y0: Tensor, options: Any) -> bool:
    """Whether JᵀJ is too large to be formed, or too large to be fast; what is recorded has to form it."""
    if options.matrix_free is not None or y0.shape[-1] <= _SMALL:
        return bool(options.matrix_free)
    count, n = y0.shape
    rows = n + problem.part("residuals", y0).shape[-1]
    return (n > _LARGE and not torch.is_grad_enabled()) or count * rows * n * y0.dtype.itemsize > _MOST


def _converged(
    old: State, new: State, length: Tensor, accepted: Tensor | None, options: Any
) -> Tensor | None:
    """Which samples are left by their step with nothing but rounding; None: no one is.

    With ρ = s₂/s₁, s₂ ρ / (1 − ρ) ≤ ε reads (s₂ + ε) s₂ ≤ ε s₁, which divides by nothing. A few units in the
    last place on top of s₁ let steps of that length pass whatever came before them.
    """
    eps = torch.finfo(length.dtype).eps
    y, step = new.y.detach(), new.step.detach()
    size = y.abs().amax(-1)
    allowed = size * (eps**0.75 if options.xtol is None else max(options.xtol, 4 * eps))
    short = (length + allowed) * length <= allowed * torch.add(old.length, size, alpha=8 * eps)
    flat = (new.slope.detach() * step).sum(-1) <= (4 * eps) * new.cost  # half of what the step promises
    if not may_have(short | flat):
        return None
    short = short & (length <= _NEAR * size)
    no_shorter = length > 0.5 * old.length
    if accepted is not None:
        short, no_shorter = short & accepted, no_shorter | ~accepted
    return short | (no_shorter & flat)
