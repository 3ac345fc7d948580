"""Rules about the call ``solve(problem, y0, options) -> SolverResult`` itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from invlayer_core.solvers import Problem, SolverResult
from invlayer_core.testing.problems import pose
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import Subject
from invlayer_core.testing.zoo import quadratic, regular_cases

__all__ = ["result_fields", "unknown_option"]

_NO_SUCH_OPTION: Final = "no_such_option"


@rule
def result_fields(subject: Subject) -> str:
    """solve() returns a SolverResult whose fields have the shapes and types of the contract."""
    calls = 0
    for kind, case in subject.each(*regular_cases(), quadratic(batch=(2,), size=1)):
        options = subject.options_for(case)
        for problem, y0 in pose(case, kind, batched=subject.solver.batched):
            result = subject.solver.solve(problem, y0.copy() if hasattr(y0, "copy") else y0, options)
            _check_fields(result, problem, y0)
            calls += 1
    return f"{calls} results, all fields as the contract has them"


def _check_fields(result: Any, problem: Problem, y0: Any) -> None:
    batch = getattr(problem, "batch", None)
    if not isinstance(result, SolverResult):
        raise _wrong("a SolverResult", type(result).__name__)
    if not _is_solution(result.y, y0):
        kind = "Tensor" if batch else "float array"
        raise _wrong(f"y a real {kind} of shape {tuple(y0.shape)}, dtype {y0.dtype}", _described(result.y))
    if not _is_scalar_or_row(result.success, batch, "bool"):
        raise _wrong(f"success a bool{_or_mask(batch)}", _described(result.success))
    if not _is_scalar_or_row(result.iterations, batch, "int"):
        raise _wrong(f"iterations an int{_or_mask(batch)}", _described(result.iterations))
    if not isinstance(result.message, str) and not (batch and _are_words(result.message, batch)):
        raise _wrong(f"message a str{f', or {batch} of them' if batch else ''}", _described(result.message))
    if not isinstance(result.aux, Mapping):
        raise _wrong("aux a mapping", _described(result.aux))


def _are_words(message: Any, batch: int) -> bool:
    words = isinstance(message, (list, tuple)) and all(isinstance(word, str) for word in message)
    return words and len(message) == batch


def _is_solution(y: Any, y0: Any) -> bool:
    if isinstance(y0, Tensor):
        return isinstance(y, Tensor) and y.shape == y0.shape and y.dtype == y0.dtype
    floating = y.is_floating_point() if isinstance(y, Tensor) else _numpy_kind(y) == "f"
    return floating and tuple(y.shape) == tuple(y0.shape)


def _is_scalar_or_row(value: Any, batch: int | None, wanted: str) -> bool:
    if isinstance(value, Tensor):
        right = (value.dtype == torch.bool) == (wanted == "bool") and not value.is_floating_point()
        return right and (value.ndim == 0 or tuple(value.shape) == (batch,))
    if isinstance(value, (bool, int)):
        return isinstance(value, bool) == (wanted == "bool")
    return _numpy_kind(value) in ("b" if wanted == "bool" else "iu") and getattr(value, "shape", None) == ()


def _numpy_kind(value: Any) -> str:
    """``dtype.kind`` of a NumPy array or scalar, ``"-"`` for anything else."""
    return str(getattr(getattr(value, "dtype", None), "kind", "-"))


def _or_mask(batch: int | None) -> str:
    return "" if batch is None else f", or a Tensor of shape ({batch},)"


def _described(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, dtype {value.dtype}"
    return f"{type(value).__name__} {value!r}"


def _wrong(expected: str, came: str) -> Violation:
    return Violation(expected, came, "See SolverResult for what each field is, and convert it in solve().")


@rule
def unknown_option(subject: Subject) -> str:
    """An option that the solver does not know raises TypeError naming it."""
    case = subject.suited(quadratic())
    problem, y0 = pose(case, subject.kinds[0], batched=subject.solver.batched)[0]
    options = {**subject.options_for(case), _NO_SUCH_OPTION: 1}
    try:
        subject.solver.solve(problem, y0, options)
    except TypeError as error:
        if _NO_SUCH_OPTION not in str(error):
            raise _swallowed(f"TypeError without the name: {error}") from error
        return f"TypeError: {error}"
    except Exception as error:
        raise _swallowed(f"{type(error).__name__}: {error}") from error
    raise _swallowed("no error")


def _swallowed(came: str) -> Violation:
    return Violation(
        f"options={{{_NO_SUCH_OPTION!r}: 1}} to raise a TypeError that names it",
        came,
        "Compare the names in options with those you accept, before solving: a misspelt one would have no "
        "effect, unseen.",
    )
