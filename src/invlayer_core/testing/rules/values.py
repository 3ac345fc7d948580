"""Rules about the solution itself: right, in the right precision, and honestly reported."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core.certificate import SolveInfo
from invlayer_core.solvers import Status
from invlayer_core.testing.oracles import nearest_root
from invlayer_core.testing.problems import pose
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import Subject
from invlayer_core.testing.zoo import Case, regular_cases, square

__all__ = ["claims", "dtype", "require_solved", "values"]


@rule
def values(subject: Subject) -> str:
    """Regular problems of every kind are solved to the tolerance."""
    residuals, errors = [], []
    for kind, case in subject.each(*regular_cases()):
        y, info = subject.solve(case, kind)
        errors.append(require_solved(subject, case, kind, y, info))
        residuals.append(float(info.residual.max()))
    return (
        f"{len(errors)} problems; residuals up to {max(residuals):.1e}, errors of y up to {max(errors):.1e} "
        f"(tolerance {subject.tolerance:.1e})"
    )


def require_solved(subject: Subject, case: Case, kind: str, y: Tensor, info: SolveInfo) -> float:
    """Refuse a sample that is not certified, or not near a root; return the largest error of y."""
    problem = f"{case.name} as {kind}, start of shape {tuple(case.start.shape)}, {case.start.dtype}"
    remedy = "Correct solve(); if the method stops early by design, pass check_solver(tolerance=...)."
    if not bool(info.ok.all()):
        came = ", ".join(
            f"{status.name} with residual {float(residual):.1e} ({message or 'no message'})"
            for status, residual, message in zip(
                info.status, info.residual.reshape(-1), info.message, strict=True
            )
            if not status.ok
        )
        raise Violation(f"every sample to be CONVERGED ({problem})", came, remedy)
    error = (y.detach().double() - nearest_root(case, y)).abs()
    if not bool((error <= subject.error_bound(y)).all()):
        raise Violation(
            f"y within the tolerance of a root ({problem})", f"an error of {float(error.max()):.1e}", remedy
        )
    return float(error.max()) if error.numel() else 0.0


@rule
def claims(subject: Subject) -> str:
    """success is True where regular problems are solved, and not where they are missed."""
    verdicts = [_require_honest_claims(subject, case, kind) for kind, case in subject.each(*regular_cases())]
    claimed = [verdict for case in verdicts for verdict in case]
    if 2 * sum(claimed) < len(claimed):
        raise _too_modest(f"{len(claimed) - sum(claimed)} of {len(claimed)} samples")
    rootless = subject.suited(square().shifted(-2.5))
    lies = [kind for kind in subject.kinds if any(_claimed(subject, rootless, kind))]
    warning = (
        f"; it claims a root of y² = −b ({', '.join(lies)}), so only the residual can tell" if lies else ""
    )
    return f"success and status agree on {len(verdicts)} regular problems{warning}"


def _require_honest_claims(subject: Subject, case: Case, kind: str) -> list[bool]:
    """What the solver claims of every sample, none of them in vain, and none left out without a reason.

    A reason is that F cannot fall any further: there MINPACK, for one, reports that it makes no progress.
    """
    _, info = subject.solve(case, kind)
    liars = [i for i, status in enumerate(info.status) if status is Status.FALSE_CONVERGENCE]
    if liars:
        raise Violation(
            f"success=True only where F(y) is zero ({case.name} as {kind})",
            f"{Status.FALSE_CONVERGENCE.name} for samples {liars}, with residuals "
            f"{[f'{float(info.residual[i]):.1e}' for i in liars]}",
            "Return success=False where the solver's own stopping test was not met.",
        )
    claimed = _claimed(subject, case, kind)
    # Of an objective rounding leaves half the digits where it is flat.
    digits = torch.finfo(info.residual.dtype).eps ** (0.5 if kind == "minimize" else 1.0)
    to_rounding = info.residual.reshape(-1) <= _ROUNDING * digits
    modest = [
        i for i, (said, spent) in enumerate(zip(claimed, to_rounding, strict=True)) if not (said or spent)
    ]
    if bool(info.ok.all()) and modest:
        raise _too_modest(f"samples {modest} of {case.name} as {kind}")
    return claimed


_ROUNDING = 100.0  # units in the last place of numbers near 1, which those of the regular problems are


def _too_modest(which: str) -> Violation:
    return Violation(
        "success=True where F(y) is zero",
        f"success=False with a residual within the tolerance ({which})",
        "Map the solver's own return code to success; the message tells what it said.",
    )


def _claimed(subject: Subject, case: Case, kind: str) -> list[bool]:
    """``success`` of every sample, from calling solve() directly; False where it raises."""
    claimed: list[bool] = []
    for problem, y0 in pose(case, kind, batched=subject.solver.batched):
        try:
            success = subject.solver.solve(problem, y0, subject.options_for(case)).success
        except Exception:  # an exception is one way to report a failure
            success = False
        count = y0.shape[0] if subject.solver.batched else 1  # a batched solver may claim for all at once
        claimed += torch.as_tensor(success).reshape(-1).expand(count).tolist()
    return claimed


@rule
def dtype(subject: Subject) -> str:
    """float32 gives float32 and float64 gives float64, each to its own accuracy."""
    errors = {torch.float32: 0.0, torch.float64: 0.0}
    for precision in errors:
        for kind, regular in subject.each(*regular_cases()):
            case = regular.to(precision)
            _require_kept_dtype(subject, case, kind)
            y, info = subject.solve(case, kind)
            error = require_solved(subject, case, kind, y, info)
            errors[precision] = max(errors[precision], error)
    return ", ".join(f"{precision} in and out, error {error:.1e}" for precision, error in errors.items())


def _require_kept_dtype(subject: Subject, case: Case, kind: str) -> None:
    """A batched solver works where its tensors are; a per-sample one has float64 at its border."""
    if not subject.solver.batched:
        return
    for problem, y0 in pose(case, kind, batched=True):
        came = subject.solver.solve(problem, y0, subject.options_for(case)).y.dtype
        if came != case.start.dtype:
            raise Violation(
                f"y in the dtype of y0, {case.start.dtype} ({case.name} as {kind})",
                f"{came}",
                "Make every tensor in solve() like y0: torch.zeros_like(y0), torch.finfo(y0.dtype).eps.",
            )
