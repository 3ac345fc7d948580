"""Rules about what the spec says of the adapter."""

from __future__ import annotations

from invlayer_core.errors import SolverLoadError
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import Subject

__all__ = ["batched_flag", "loading"]


@rule
def loading(subject: Subject) -> str:
    """The spec's factory is a concrete Solver class that is made without arguments."""
    failures: list[SolverLoadError] = []
    for batched in (subject.spec.batched, not subject.spec.batched):
        try:
            return f"{subject.spec.factory} gives {type(subject.load(batched=batched)).__name__}()"
        except SolverLoadError as error:
            failures.append(error)
    raise Violation(
        f"{subject.spec.factory!r} to be a class with solve(), made without arguments, its requirements met",
        str(failures[0]),
        "Correct SolverSpec(factory=..., requires=...), or the class it names.",
    ) from failures[0]


@rule
def batched_flag(subject: Subject) -> str:
    """SolverSpec.batched agrees with the class attribute Solver.batched."""
    declared, actual = subject.spec.batched, subject.solver.batched
    if declared is not actual:
        raise Violation(
            f"one answer to whether {subject.spec.name!r} takes whole batches",
            f"SolverSpec(batched={declared}) and {type(subject.solver).__name__}.batched = {actual}",
            "Set both to True if solve() takes (B, n) tensors, both to False if it takes (n,) arrays.",
        )
    return f"both are {actual}"
