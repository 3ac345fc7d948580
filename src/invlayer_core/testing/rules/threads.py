"""The rule about threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from invlayer_core.testing.oracles import same
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import NotApplicable, Subject
from invlayer_core.testing.zoo import Case, coupled_cubic

__all__ = ["thread_safety"]

_THREADS: Final = 4
_SOLVES: Final = 3  # of each thread
_PAUSE: Final = 2e-4  # seconds; enough for another thread to go on


@rule
def thread_safety(subject: Subject) -> str:
    """Solves of one instance in several threads give what they give one after the other."""
    if not subject.spec.thread_safe:
        raise NotApplicable("SolverSpec(thread_safe=False): the solver is never called from two threads at once")
    for kind in subject.kinds:
        cases = [_slowed(shift) for shift in range(_THREADS * _SOLVES)]
        solve = lambda case, kind=kind: subject.solve(case, kind)[0]  # noqa: E731
        serial = [solve(case) for case in cases]
        with ThreadPoolExecutor(_THREADS) as pool:
            threaded = list(pool.map(solve, cases))
        _require_same(serial, threaded, kind)
    return f"{_THREADS} threads × {_SOLVES} solves, interleaved within each solve, bitwise as one by one"


def _slowed(shift: int) -> Case:
    """A problem of its own for every solve."""
    case = coupled_cubic((2,))
    b, A = case.args
    return replace(case, function=_Yielding(case.function), args=(b + 0.05 * shift, A))


@final
@dataclass(frozen=True)
class _Yielding:
    """F, which lets another thread go on at every evaluation."""

    function: Callable[..., Tensor]

    def __call__(self, y: Tensor, *args: Tensor) -> Tensor:
        time.sleep(_PAUSE)
        return self.function(y, *args)


def _require_same(serial: list[Tensor], threaded: list[Tensor], kind: str) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(serial, threaded, strict=True)) if not same(a, b)]
    if wrong:
        raise Violation(
            f"{len(serial)} solves in {_THREADS} threads to give what they give one by one ({kind})",
            f"{len(wrong)} other results",
            "Keep what belongs to one call in local variables, or declare SolverSpec(thread_safe=False).",
        )
