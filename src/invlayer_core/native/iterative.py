"""What the iterative solvers of this package share: a batch whose samples stop one by one.

A solver is a state, tensors with one row per sample, and a step from state to state. Samples that have
finished are frozen, so that what one does never changes another's, by a bit. Nothing waits for the device in
between: whether all have finished is asked every ``check_every`` iterations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from invlayer_core.solvers.contract import BatchProblem, SolverResult
from invlayer_core.solvers.iterations import DifferentiableSolver, any_sample, surely_all

__all__ = ["IterativeSolver", "Options", "State", "pick", "shortened"]


@dataclass(frozen=True)
class Options:
    """What every iterative solver takes.

    maxiter : most iterations. check_every : after how many it is asked whether all samples have finished; 0
    stands for 1 on the CPU and 10 on an accelerator, where asking makes it wait. The answer is the same.
    """

    maxiter: int = 100
    check_every: int = 0


@dataclass(frozen=True)
class State:
    """The iterate, and which samples have finished well, or given up.

    Attributes
    ----------
    y : Tensor of shape ``(B, n)``
    converged, failed : bool Tensor of shape ``(B,)``
    trial : Tensor of shape ``(B, n)``
        The next point to evaluate; y, where a sample has finished.
    """

    y: Tensor
    converged: Tensor
    failed: Tensor
    trial: Tensor


_RESULT = ("y", "converged", "failed", "trial")


S = TypeVar("S", bound=State)


class IterativeSolver(DifferentiableSolver):
    """A solver that is a start and a step.

    Attributes
    ----------
    name : str
    Options : type
        A frozen dataclass, whose fields are the options.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options

    @abstractmethod
    def start(self, problem: BatchProblem, y0: Tensor, options: Any) -> Any:
        """The state before the first iteration."""

    @abstractmethod
    def step(self, problem: BatchProblem, state: Any, options: Any) -> Any:
        """One iteration of every sample, without regard to which have finished."""

    def near(self, options: Any) -> Any:
        """The options for iterations from a solution: without what is only for the way there."""
        return options

    def describe(self, state: Any, options: Any) -> str:
        """What ran, for ``SolveInfo.message``."""
        return f"{self.name} with maxiter={options.maxiter}"

    def finish(self, state: Any) -> Tensor:
        """The solution, from the last state: the next point, if there is one."""
        return pick(state.trial.isfinite().all(-1), state.trial, state.y)

    def solve(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        settings = self._read(options)
        every = settings.check_every or (1 if y0.device.type == "cpu" else 10)
        state = first = self.start(problem, y0, settings)
        active = ~(state.converged | state.failed)
        iterations, everyone = torch.zeros_like(active, dtype=torch.int64), True
        for k in range(settings.maxiter):
            if (k == 0 or not everyone) and k % every == 0 and not any_sample(active):
                break
            new = self.step(problem, state, settings)
            state = new if everyone else _merged(active, new, state)
            if state.converged is first.converged and state.failed is first.failed:
                iterations = iterations + 1  # nothing was found out
                continue
            iterations = iterations + active
            active = active & ~(state.converged | state.failed)
            everyone = surely_all(active)
        return SolverResult(
            y=self.finish(state),
            success=state.converged,
            iterations=iterations,
            message=f"{self.describe(state, settings)}.",
        )

    def iterate(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any], steps: int) -> Tensor:
        settings = self.near(self._read(options))
        state = self.start(problem, y0, settings)
        for _ in range(steps):
            state = self.step(problem, state, settings)
        return self.finish(state)

    def _read(self, options: Mapping[str, Any]) -> Any:
        accepted = [field.name for field in fields(self.Options)]
        unknown = sorted(set(options) - set(accepted))
        if unknown:
            raise TypeError(f"{self.name}: unknown options {unknown}; accepted are {sorted(accepted)}.")
        return self.Options(**options)


def pick(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` in the rows where the mask holds, ``other`` elsewhere."""
    return torch.where(mask.reshape(-1, *(1 for _ in range(one.ndim - 1))), one, other)


def shortened(scale: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The minimum of the parabola through ‖F‖² and its slope at 0 and ‖F‖² at ``scale``; within limits."""
    change = (after / before).square() - 1
    least = scale.square() / (change + 2 * scale)
    return torch.where(least.isfinite(), least.clamp(0.1 * scale, 0.5 * scale), 0.1 * scale)


def _merged(active: Tensor, new: S, old: S) -> S:
    """``new`` in the rows of active samples, ``old`` in the others.

    Of what has finished only the result counts. On the graph it all stays as it was, lest a row that goes on
    without need comes to divide by zero.
    """
    names = [field.name for field in fields(new)] if torch.is_grad_enabled() else _RESULT
    merged = {}
    for name in names:
        one, other = getattr(new, name), getattr(old, name)
        if isinstance(one, Tensor) and one is not other:
            merged[name] = pick(active, one, other)
    return replace(new, **merged)
