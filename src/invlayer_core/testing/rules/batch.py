"""Rules about batches: a batch is its samples, in whatever order and shape."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core.testing.oracles import same
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.rules.values import require_solved
from invlayer_core.testing.subject import Subject
from invlayer_core.testing.zoo import Case, coupled_cubic, quadratic, transcendental

__all__ = ["batch_is_its_samples", "permutation", "shapes"]

_BATCH = (5,)
_REMEDY = (
    "Nothing in solve() may depend on the other samples: no stopping test, step length or start that is "
    "shared, no shape that is guessed."
)


@rule
def batch_is_its_samples(subject: Subject) -> str:
    """A batch gives what its samples give alone."""
    bitwise = 0
    for kind, case in subject.each(*_uneven_cases(), transcendental(_BATCH)):
        together, _ = subject.solve(case, kind)
        alone = torch.stack([subject.solve(case.select(i), kind)[0] for i in range(*_BATCH)])
        exact = case.is_exact(kind) and not subject.solver.batched
        _require_equal(subject, together, alone, f"{case.name} as {kind}: batch and samples alone", exact)
        bitwise += exact
    return (
        f"{3 * len(subject.kinds)} batches of {_BATCH[0]}, {bitwise} of them bitwise as their samples alone"
    )


def _uneven_cases() -> tuple[Case, Case]:
    """Batches whose samples take different numbers of iterations."""
    return quadratic(_BATCH).spread(1.5), coupled_cubic(_BATCH).spread(0.5)


def _require_equal(subject: Subject, one: Tensor, other: Tensor, what: str, exact: bool) -> None:
    difference = (one - other).abs()
    if same(one, other) or (not exact and bool((difference <= subject.error_bound(other)).all())):
        return
    raise Violation(
        f"{what} to agree {'bit for bit' if exact else 'to the tolerance'}",
        f"a difference of {float(difference.max()):.1e} in samples "
        f"{(one != other).any(-1).nonzero().reshape(-1).tolist()}",
        _REMEDY,
    )


@rule
def permutation(subject: Subject) -> str:
    """Samples in another order give the same results in that order, bit for bit."""
    order = torch.tensor([3, 0, 4, 1, 2])
    for kind, case in subject.each(*_uneven_cases()):
        straight, _ = subject.solve(case, kind)
        permuted, _ = subject.solve(case.select(order), kind)
        _require_equal(
            subject, permuted, straight[order], f"{case.name} as {kind}: results of permuted samples", True
        )
    return f"{2 * len(subject.kinds)} batches of {_BATCH[0]} permuted, all bitwise equal"


@rule
def shapes(subject: Subject) -> str:
    """y has the shape of y0: one system, a batch, two batch dims, B = n, one unknown, an empty batch."""
    cases = _shaped_cases()
    for kind, case in subject.each(*cases):
        y, info = subject.solve(case, kind)
        if y.shape != case.start.shape:
            raise Violation(
                f"y of shape {tuple(case.start.shape)} ({case.name} as {kind})", f"{tuple(y.shape)}", _REMEDY
            )
        require_solved(subject, case, kind, y, info)
    return ", ".join(str(tuple(case.start.shape)) for case in cases)


def _shaped_cases() -> list[Case]:
    batches = [(), (4,), (2, 3), (3,), (1,), (0,)]
    return [*(coupled_cubic(batch, 3) for batch in batches), quadratic((), 1), quadratic((3,), 1)]
