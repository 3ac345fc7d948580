"""Rules about state: a solve is a function of its inputs, and changes nothing but its output."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch

from invlayer_core.layers import FixedPointLayer, LeastSquaresLayer, MinimizeLayer, NLPLayer, RootLayer
from invlayer_core.solvers import Solver
from invlayer_core.testing.oracles import same
from invlayer_core.testing.problems import pose
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import Subject
from invlayer_core.testing.zoo import Case, HalfNorm, coupled_cubic, quadratic, regular_cases

__all__ = ["global_state", "no_mutation", "pickling", "repeatable"]


@rule
def no_mutation(subject: Subject) -> str:
    """A solve changes neither y0, args and options nor the solver itself."""
    for kind, case in subject.each(*regular_cases()):
        _require_unchanged(subject, case, partial(subject.solve, case, kind))
        for problem, y0 in pose(case, kind, batched=subject.solver.batched):
            options = copy.deepcopy(subject.options_for(case))
            call = partial(subject.solver.solve, problem, y0, options)
            _require_unchanged(subject, case, call, options)
    given = f"options {sorted(subject.options)}" if subject.options else "options (none given)"
    return f"y0, args, {given} and the solver's attributes are bitwise as before"


def _require_unchanged(
    subject: Subject, case: Case, call: Callable[[], Any], options: Mapping[str, Any] | None = None
) -> None:
    watched = lambda: {  # noqa: E731
        "y0": case.start,
        "args": case.args,
        "options": subject.options if options is None else options,
        "the solver's attributes": _state(subject.solver),
    }
    before = {name: _fingerprint(value) for name, value in watched().items()}
    call()
    changed = [name for name, value in watched().items() if _fingerprint(value) != before[name]]
    if changed:
        raise Violation(
            f"y0, args, options and the solver to be as before ({case.name})",
            f"a change of {', '.join(changed)}",
            "Work on copies, such as dict(options); a solver is immutable, so that calls can share it: keep "
            "what belongs to one call in local variables.",
        )


def _state(solver: Solver) -> tuple[Any, dict[str, Any]]:
    """Attributes of the instance and of its class."""
    shared = {
        name: value
        for name, value in vars(type(solver)).items()
        if not name.startswith(("__", "_abc_")) and not callable(value) and not hasattr(value, "__get__")
    }
    return solver.__getstate__(), shared


def _fingerprint(value: Any) -> bytes | str:
    try:
        return pickle.dumps(value)
    except Exception:  # what cannot be pickled is at least the same object, with the same repr
        return repr(value)


@rule
def repeatable(subject: Subject) -> str:
    """The same call gives the same bits again, from the same instance and from a new one."""
    fresh = type(subject.solver)()
    for kind, case in subject.each(*regular_cases()):
        y, _ = subject.solve(case, kind)
        for which, solver in (("the same", subject.solver), ("a new", fresh)):
            again, _ = subject.solve(case, kind, solver=solver)
            if not same(y, again):
                raise Violation(
                    f"{which} instance to repeat its result bitwise ({case.name} as {kind})",
                    f"a difference of {float((y - again).abs().max()):.1e}",
                    "Start from y0 and from nothing else; seed a generator of your own in solve().",
                )
    return f"{len(regular_cases()) * len(subject.kinds)} problems, bitwise the same three times"


@rule
def global_state(subject: Subject) -> str:
    """A solve leaves the process as it was: default dtype, random generators, warnings, NumPy's errstate."""
    before = _process_state()
    for kind, case in subject.each(coupled_cubic()):
        subject.solve(case, kind)
    after = _process_state()
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise Violation(
            "the state of the process to be as before",
            f"a change of {', '.join(changed)}",
            "Use context managers (numpy.errstate) and generators of your own (numpy.random.default_rng(0)).",
        )
    return f"unchanged: {', '.join(before)}"


def _process_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's thread count": torch.get_num_threads(),
        "torch's random generator": torch.get_rng_state().tolist(),
        "random's generator": random.getstate(),
        "the warnings filters": list(warnings.filters),
    }
    if numpy := sys.modules.get("numpy"):
        state["NumPy's errstate"] = numpy.geterr()
        state["NumPy's random generator"] = pickle.dumps(numpy.random.get_state())
    return state


@rule
def pickling(subject: Subject) -> str:
    """The solver, and a layer that uses it, survive pickle and deepcopy with equal results."""
    ways: dict[str, Callable[[Any], Any]] = {
        "pickle": lambda value: pickle.loads(pickle.dumps(value)),
        "deepcopy": copy.deepcopy,
    }
    for kind, case in subject.each(quadratic()):
        layer = _layer(subject, case, kind)
        expected = layer(*case.args, y0=case.start)
        for way, duplicate in ways.items():
            _require_survival(f"the solver, by {way}", duplicate, subject.solver)
            twin = _require_survival(f"a layer with the solver, by {way}", duplicate, layer)
            if not same(twin(*case.args, y0=case.start), expected):
                raise Violation(
                    f"the copy by {way} to give the same result", "another one", "Copy every attribute."
                )
    return "solver and layer, by pickle and deepcopy, give bitwise the same result"


_LAYERS: Final[Mapping[str, Callable[..., torch.nn.Module]]] = MappingProxyType(
    {
        "root": RootLayer,
        "fixed_point": FixedPointLayer,
        "minimize": MinimizeLayer,
        "least_squares": LeastSquaresLayer,
        "nlp": lambda function, **keywords: NLPLayer(HalfNorm(), eq=function, polish=0, **keywords),
    }
)


def _layer(subject: Subject, case: Case, kind: str) -> torch.nn.Module:
    layer = _LAYERS[kind]
    tolerance = subject.tolerance
    return layer(
        case.posed(kind),
        solver=subject.solver,
        options=subject.options_for(case),
        atol=tolerance,
        rtol=tolerance,
    )


def _require_survival(what: str, duplicate: Callable[[Any], Any], value: Any) -> Any:
    try:
        return duplicate(value)
    except Exception as error:
        raise Violation(
            f"{what} to survive",
            f"{type(error).__name__}: {error}",
            "Keep no lambdas, locks or handles in attributes; make them in solve(), or define __reduce__.",
        ) from error
