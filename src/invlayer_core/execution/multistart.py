"""Several starts per sample, tried in order: a forward that runs another one until every sample is solved.

Each start is one run of the whole batch. A sample that is solved rests at its solution while the others go
on, and keeps the value that it had when it was first accepted. Where something is minimised, all starts are
tried, and the least of the minima found is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Size, Tensor

from invlayer_core.conditions.system import System
from invlayer_core.execution.forward import AroundForward, Forward, Slices
from invlayer_core.execution.outcome import Outcome

__all__ = ["Acceptance", "Multistart"]

Acceptance = Callable[[System, Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
"""``(system, y, theta, status) -> (ok, residual)``: which samples are solved, and ‖F‖ of each, ``(B,)``."""


@final
@dataclass(frozen=True)
class Multistart(AroundForward):
    """Tensors are ``(starts, ...)``: those of ``inner``, whose first is one guess, with all of θ among them.

    Attributes
    ----------
    inner : Forward
    system : System
        Measures what a start has led to.
    accept : Acceptance
    first_theta : int
        Where among the tensors θ begins.
    """

    inner: Forward
    system: System
    accept: Acceptance
    first_theta: int = 1

    @property
    def expected(self) -> Size:
        """The shape of y."""
        return self.system.shape.full

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
        starts, first = tensors[0], self.first_theta
        theta = tensors[first : first + len(self.system.theta)]
        best: _Attempt | None = None
        for number, start in enumerate(starts.unbind(0)):
            if best is not None and not self._minimises:
                start = torch.where(self._event_like(best.ok), best.y.to(start), start)
            y, outcome = self.inner.run([start, *tensors[1:]])
            ok, residual = self.accept(self.system, y, theta, outcome.status)
            attempt = _Attempt(y, outcome, ok, residual, self._height(y, theta))
            best = self._better(best, attempt, number)
            if bool(best.ok.all()) and not self._minimises:
                break
        assert best is not None
        return best.y, best.outcome

    @property
    def _minimises(self) -> bool:
        return "objective" in self.system.parts

    def _height(self, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """What is minimised, ``(B,)``; 0 where that is nothing, so that the first solution stands."""
        if not self._minimises:
            return y.new_zeros(self.system.shape.count)
        with torch.no_grad():
            return self.system.of_part("objective").residual(y, theta).reshape(-1)

    def _event_like(self, mask: Tensor) -> Tensor:
        shape = self.system.shape
        return mask.reshape((*shape.batch, *(1 for _ in shape.event)))

    def _better(self, old: _Attempt | None, new: _Attempt, number: int) -> _Attempt:
        """Per sample the solution to take, or else what has the least residual."""
        count = self.system.shape.count
        if old is None:
            first = torch.zeros(count, dtype=torch.int64, device=new.ok.device)
            return replace(new, outcome=replace(new.outcome, start=first))
        closer = (new.residual < old.residual) | (old.residual.isnan() & ~new.residual.isnan())
        gains = torch.where(old.ok, new.ok & (new.height < old.height), new.ok | closer)
        y = torch.where(self._event_like(gains), new.y, old.y)
        outcome = replace(_chosen(gains, old.outcome, new.outcome, number), y=y)
        residual = torch.where(gains, new.residual, old.residual)
        return _Attempt(y, outcome, old.ok | new.ok, residual, torch.where(gains, new.height, old.height))

    def mapped(self, size: int, dims: Sequence[int | None]) -> Slices:
        return Slices(self, size, tuple(dims))


@final
@dataclass(frozen=True)
class _Attempt:
    """What the starts so far have led to, per sample."""

    y: Tensor
    outcome: Outcome
    ok: Tensor
    residual: Tensor
    height: Tensor


def _chosen(gains: Tensor, old: Outcome, new: Outcome, number: int) -> Outcome:
    """The outcome of ``new`` where a sample gains by it, without y."""
    mask, picks = gains.reshape(old.status.shape), gains.tolist()
    assert old.start is not None

    def pick(olds: tuple[Any, ...], news: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(n if gain else o for gain, o, n in zip(picks, olds, news, strict=True))

    one_each = len(old.aux) == len(new.aux) == len(picks)
    return replace(
        old,
        status=torch.where(mask, new.status, old.status),
        iterations=torch.where(mask, new.iterations, old.iterations),
        message=pick(old.message, new.message),
        cause=old.cause or new.cause,
        aux=pick(old.aux, new.aux) if one_each else (),  # one for the whole batch fits no mixture
        start=torch.where(gains, number, old.start),
    )
