"""The forward of a problem that is solved already, but may be differentiated by its solver's iterations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.execution.forward import AroundForward, Forward
from invlayer_core.execution.outcome import Outcome
from invlayer_core.solvers.iterations import Iterations

__all__ = ["SettledForward", "continued"]


@final
@dataclass(frozen=True)
class SettledForward(AroundForward):
    """Tensors are ``(y, *tensors of inner)``, and y is the solution.

    Attributes
    ----------
    inner : Forward
        The one that found it, for adjoints that run it again.
    outcome : Outcome
        What it left.
    """

    inner: Forward
    outcome: Outcome

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        y = tensors[0].clone()
        return y, replace(self.outcome, y=y.reshape(-1, y.shape[-1]))

    def iterations(self, tensors: Sequence[Tensor], called: str) -> Iterations:
        return self.inner.iterations(tensors[1:], called)

    def resolver(self, tensors: Sequence[Tensor], called: str) -> Callable[[System, Tensor], Tensor]:
        return self.inner.resolver(tensors[1:], called)

    def mapped(self, size: int, dims: Sequence[int | None]) -> SettledForward:
        return replace(self, inner=self.inner.mapped(size, dims[1:]))

    def moved(self, tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> tuple[Tensor, ...]:
        first = _functorch.mapped_first(tensors[0], dims[0], size)
        return first, *self.inner.moved(tensors[1:], dims[1:], size)


def continued(first: Outcome, later: Outcome, mask: Tensor) -> Outcome:
    """The outcome of a solve that went on where ``mask`` ``(B,)`` holds; iterations are counted together."""
    mask = mask.reshape(first.status.shape)
    picks = mask.reshape(-1).tolist()

    def pick(olds: tuple[Any, ...], news: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(new if goes_on else old for goes_on, old, new in zip(picks, olds, news, strict=True))

    both = torch.where(later.iterations < 0, -1, first.iterations + later.iterations)
    one_each = len(first.aux) == len(later.aux) == len(picks)
    return replace(
        first,
        status=torch.where(mask, later.status, first.status),
        iterations=torch.where(mask, both.reshape(mask.shape), first.iterations.reshape(mask.shape)),
        message=pick(first.message, later.message),
        cause=later.cause or first.cause,
        aux=pick(first.aux, later.aux) if one_each else (),
        without_doubts=first.without_doubts and later.without_doubts,
    )
