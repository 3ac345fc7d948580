"""The rule about threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, final

from torch import Tensor

from invlayer_core.testing.oracles import same
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import NotApplicable, Subject
from invlayer_core.testing.zoo import Case, coupled_cubic, square

__all__ = ["thread_safety"]

_THREADS: Final = 4
_SOLVES: Final = 3  # of each thread
_PAUSE: Final = 2e-4  # seconds; enough for another thread to go on


@rule
def thread_safety(subject: Subject) -> str:
    """Solves of one instance in several threads give what they give one after the other."""
    if not subject.spec.thread_safe:
        raise NotApplicable("SolverSpec(thread_safe=False): two threads never call the solver at once")
    for kind in subject.kinds:
        cases = [_slowed(subject, shift) for shift in range(_THREADS * _SOLVES)]
        solve = partial(subject.solve, kind=kind)
        serial = [solve(case) for case in cases]
        with ThreadPoolExecutor(_THREADS) as pool:
            threaded = list(pool.map(solve, cases))
        _require_same([y for y, _ in serial], [y for y, _ in threaded], f"{_THREADS} threads ({kind})")
        if not subject.solver.batched:
            _require_lockstep(subject, kind)
    lockstep = "" if subject.solver.batched else "; lockstep bitwise as serial"
    return f"{_THREADS} threads × {_SOLVES} solves, interleaved within each, bitwise as one by one{lockstep}"


def _require_lockstep(subject: Subject, kind: str) -> None:
    """The samples of a batch, each in a thread of its own that waits for the others at every F."""
    rootless = square().shifted(-2.5, index=1)  # one sample of it
    cases = (subject.suited(coupled_cubic((3,))), subject.suited(rootless))
    serial, lockstep = (
        [subject.solve(case, kind, batch=batch)[0] for case in cases] for batch in ("serial", "lockstep")
    )
    _require_same(serial, lockstep, f"lockstep ({kind})")


def _slowed(subject: Subject, shift: int) -> Case:
    """A problem of its own for every solve."""
    case = subject.suited(coupled_cubic((2,)))
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


def _require_same(serial: list[Tensor], threaded: list[Tensor], how: str) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(serial, threaded, strict=True)) if not same(a, b)]
    if wrong:
        raise Violation(
            f"{len(serial)} solves in {how} to give what they give one by one",
            f"{len(wrong)} other results",
            "Keep what belongs to one call in local variables, or declare SolverSpec(thread_safe=False).",
        )
