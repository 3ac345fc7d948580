"""Rules for solvers of quadratic programs."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Final

import torch
from torch import Tensor

from invlayer_core.errors import ConvergenceError
from invlayer_core.functional.quadratic import qp
from invlayer_core.testing.programs import exact_solution, infeasible_program, program, programs
from invlayer_core.testing.rules.loading import batched_flag, loading
from invlayer_core.testing.rules.registration import registration
from invlayer_core.testing.rules.rule import Rule, Violation, rule
from invlayer_core.testing.subject import Subject

__all__ = ["PROGRAM_RULES"]

_SHOULD = 1e-9  # what certifying and polishing make of any answer that is near enough


def _solve(subject: Subject, given: dict[str, Tensor], **keywords: Any) -> Any:
    return qp(**given, solver=subject.solver, options=dict(subject.options), **keywords)  # type: ignore[arg-type]


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / max(1.0, float(wanted.detach().abs().max())))


@rule
def solutions(subject: Subject) -> str:
    """Programs with any subset of the arguments are solved, and their active sets proved."""
    worst = 0.0
    for names, given in programs().items():
        x, info = _solve(subject, given, return_info=True)
        gap = _gap(x, exact_solution(given, x))
        if gap > _SHOULD or info.aux[0]["ambiguous"]:
            raise Violation(
                f"the solution of a program with {names} to {_SHOULD:g}",
                f"one that is {gap:.1e} away",
                "Return problem.answer(x, equality=..., inequality=..., lower=..., upper=...) with the "
                "multipliers in the signs that its docstring gives, or leave them out.",
            )
        worst = max(worst, gap)
    return f"relative error {worst:.0e}"


@rule
def multipliers(subject: Subject) -> str:
    """The multipliers that solve() returns have the signs of P x + q + Aᵀν + Gᵀλ − λ_lb + λ_ub = 0."""
    given = program(3)
    _, (nu, lam, lower, upper) = _solve(subject, given, polish=0, return_multipliers=True, atol=1e3)
    x = _solve(subject, given)
    left = given["P"] @ x + given["q"] + given["A"].mT @ nu + given["G"].mT @ lam - lower + upper
    size = float(given["q"].abs().max())
    if float(left.abs().max()) > 1e-3 * size:
        raise Violation(
            "P x + q + Aᵀν + Gᵀλ − λ_lb + λ_ub = 0 to 1e-3",
            f"{float(left.abs().max()) / size:.1e}",
            "Turn the sign of a multiplier, put them in the right order, or leave out what is not told.",
        )
    return f"stationary to {float(left.abs().max()) / size:.0e}"


@rule
def program_gradients(subject: Subject) -> str:
    """Gradients for every argument are those of the optimality conditions."""
    given = {name: tensor.requires_grad_() for name, tensor in program(3).items()}
    x = _solve(subject, given)
    ours = torch.autograd.grad(x.square().sum(), list(given.values()))
    exact = exact_solution(given, x)
    theirs = torch.autograd.grad(exact.square().sum(), list(given.values()), materialize_grads=True)
    for name, found, wanted in zip(given, ours, theirs, strict=True):
        wanted = (wanted + wanted.mT) / 2 if name == "P" else wanted
        if _gap(found, wanted) > 1e-7:
            raise Violation(
                f"the gradient for {name} to 1e-7",
                f"{_gap(found, wanted):.1e}",
                "See rule 'solutions' first.",
            )
    return "all eight agree"


@rule
def program_batch(subject: Subject) -> str:
    """A batch is its samples, and one without a solution leaves the others alone."""
    given = program(3)
    given["q"] = given["q"] + torch.arange(3.0, dtype=torch.float64).unsqueeze(-1)
    whole = _solve(subject, given)
    for i in range(3):
        alone = _solve(subject, {**given, "q": given["q"][i]})
        if _gap(whole[i], alone) > _SHOULD:
            raise Violation(
                "each sample of a batch as if it were alone", f"{_gap(whole[i], alone):.1e}", "Keep no state."
            )
    spoiled = {**given, "q": given["q"].clone()}
    spoiled["q"][1] = torch.nan
    others = _solve(subject, spoiled, on_failure="nan")
    if not torch.equal(others[[0, 2]], whole[[0, 2]]):
        raise Violation("the other samples as they were", "other numbers", "Treat every sample by itself.")
    return "three samples, one spoiled"


@rule
def no_solution(subject: Subject) -> str:
    """An infeasible program is a failure with a message, and never a solution."""
    try:
        x = _solve(subject, infeasible_program())
    except ConvergenceError as error:
        said = "" if error.info is None else error.info.message[0]
    else:
        raise Violation("ConvergenceError for an infeasible program", f"{x.tolist()}", "Report no success.")
    if not said:
        raise Violation(
            "a message that tells what became of an infeasible program",
            "none",
            "Return SolverResult(success=False, message=...) with the library's own words.",
        )
    return said


@rule
def arguments_unchanged(subject: Subject) -> str:
    """Tensors of the caller stay as they are, and a second solve gives the same."""
    given = program(3)
    before = {name: tensor.clone() for name, tensor in given.items()}
    first, second = _solve(subject, given), _solve(subject, given)
    changed = [name for name in given if not torch.equal(given[name], before[name])]
    if changed:
        raise Violation("the arguments as they were", f"others: {', '.join(changed)}", "Copy before writing.")
    if not torch.equal(first, second):
        raise Violation("the same solution twice", f"{_gap(first, second):.1e} apart", "Keep no state.")
    return "unchanged, and repeated to the bit"


@rule
def program_pickling(subject: Subject) -> str:
    """The solver can be copied and pickled."""
    for way, other in (
        ("deepcopy", copy.deepcopy(subject.solver)),
        ("pickle", pickle.loads(pickle.dumps(subject.solver))),
    ):
        if type(other) is not type(subject.solver):
            raise Violation(
                f"{type(subject.solver).__name__} by {way}", type(other).__name__, "Keep it simple."
            )
    return "copied and pickled"


PROGRAM_RULES: Final[tuple[Rule, ...]] = (
    loading,
    batched_flag,
    solutions,
    multipliers,
    program_gradients,
    program_batch,
    no_solution,
    arguments_unchanged,
    program_pickling,
    registration,
)
"""The rules for the kind ``"qp"``, in the order in which they are applied."""
