"""The verdict on a solve, per sample, by our own measurement of F(y*).

A solver's word counts for nothing here: SciPy's ``hybr`` calls x² − 2x solved at x = 1.01, where
F = −0.9999 (scipy issue 17488). One evaluation of the conditions after the solve settles it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConvergenceError, ConvergenceWarning, warn_user
from invlayer_core.solvers.contract import Status

__all__ = [
    "SolveInfo",
    "Verdict",
    "all_hold",
    "default_tolerance",
    "judge",
    "nudged",
    "report_failures",
]

_SHOWN = 5  # failing samples named in a message


def default_tolerance(dtype: torch.dtype) -> float:
    """Default for both ``atol`` and ``rtol``: 1e-6 in float64, 1e-3 in float32."""
    return 1e-6 if dtype == torch.float64 else 1e-3


@final
@dataclass(frozen=True)
class SolveInfo:
    """What happened in one call, per sample; every tensor has the batch shape ``(*batch,)``.

    Attributes
    ----------
    ok : Tensor of bool
        True where value and gradient may be used.
    status : tuple of Status
        One per sample, the batch flattened in row-major order.
    residual : Tensor
        ‖F(y*)‖∞ as measured by invlayer; NaN where nothing could be measured.
    tolerance : Tensor
        What it was compared with: ``atol``, and where a residual exceeds that, what a relative change of y*
        by ``rtol`` does to F on top.
    iterations : Tensor of int64
        As the solver counts them; -1 if it does not say.
    message : tuple of str
        The solver's own words, one per sample, the batch flattened.
    solver : str
        Which solver ran.
    batch : str
        How the batch was run: ``"serial"``, ``"threads"``, ``"processes"``, ``"executor"``, ``"lockstep"``,
        ``"stacked"``, ``"batched"`` or ``"whole"`` (one call of a plain callable).
    batch_reason : str
        Why ``batch="auto"`` chose that, with what was measured; empty where nothing was to choose.
    polish : Tensor of int64
        Newton steps that polishing kept, per sample.
    aux : tuple of mappings
        What else the solver returned, one per sample (or one for the whole batch); carries no gradient.
    linear_solver : str
        What solves the linear systems of the derivative, and why.
    objective : Tensor or None
        What ``minimize`` and ``least_squares`` have minimised, at y: f, or half the sum of squares.
    start : Tensor of int64
        Where the solution comes from: 0, or with ``n_starts`` the number of the start; -1 for the solution
        of the call before (``warm_start``).
    constraints : ConstraintInfo or None
        For problems with constraints: which are active, which weakly, and whether they are independent.
    """

    ok: Tensor
    status: tuple[Status, ...]
    residual: Tensor
    tolerance: Tensor
    iterations: Tensor
    message: tuple[str, ...]
    solver: str
    batch: str
    polish: Tensor
    aux: tuple[Mapping[str, Any], ...] = field(default=())
    linear_solver: str = ""
    batch_reason: str = ""
    start: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    constraints: Any = None
    objective: Tensor | None = None


@final
@dataclass(frozen=True)
class Verdict:
    """Residual, tolerance and status code of every sample, each ``(*batch,)``."""

    residual: Tensor
    tolerance: Tensor
    status: Tensor

    @property
    def ok(self) -> Tensor:
        """Which samples may be used."""
        return (self.status == Status.CONVERGED) | (self.status == Status.UNVERIFIED)


def _largest(vectors: Tensor) -> Tensor:
    """‖·‖∞ of ``(*batch, n)``; 0 where n is 0."""
    return vectors.abs().amax(-1) if vectors.shape[-1] else vectors.new_zeros(vectors.shape[:-1])


def absolute_tolerance(dtype: torch.dtype, atol: float | None) -> float:
    """``atol``, or the default for the dtype."""
    return default_tolerance(dtype) if atol is None else atol


def all_hold(y: Tensor, residual: Tensor, atol: float | None) -> bool:
    """Whether every sample is within ``atol`` and finite: the verdict in the common case, at the least cost.

    Both may have any shape, and carry no gradient. 0 · Σy is NaN unless y is finite (or its sum overflows:
    then it is for :func:`judge` to say), and so is then all that it is added to.
    """
    y, residual = _functorch.plain(y), _functorch.plain(residual)
    if residual.numel() == 0:
        return bool(y.isfinite().all())
    worst = residual.abs().max() + 0.0 * y.sum()
    return float(worst) <= absolute_tolerance(y.dtype, atol)  # no NaN is


def nudged(y: Tensor, rtol: float | None) -> Tensor:
    """``y`` ``(*batch, n)`` with every component changed by up to ``rtol`` of itself, unevenly."""
    steps = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    weights = (1.0 - 0.5 * (7.0 * steps.sqrt()).frac()) * torch.where(steps % 2 == 0, -1.0, 1.0).to(y)
    return y + (default_tolerance(y.dtype) if rtol is None else rtol) * weights * y


@torch.no_grad()
def judge(
    y: Tensor, residual: Tensor | None, nudged_residual: Tensor | None, reported: Tensor, atol: float | None
) -> Verdict:
    """Compare the measured residual with the tolerance.

    A sample is accepted if ‖F(y*)‖∞ ≤ atol + ‖F(y* + δ) − F(y*)‖∞, where δ changes y* by a fraction rtol: if
    its residual is small in itself, or no larger than what so small a change of y* does to F. The second
    half is free of the units of F and y; and unlike rtol ‖y*‖ it is not deceived by a solver that ran
    away, since F is flat out there.

    Parameters
    ----------
    y : Tensor of shape ``(*batch, n)``
        The solution, event dims flattened.
    residual : Tensor of shape ``(*batch, m)`` or None
        F(y); None if nothing can be measured.
    nudged_residual : Tensor of shape ``(*batch, m)`` or None
        F at :func:`nudged` y; None if every residual is within ``atol``.
    reported : Tensor of int64, shape ``(*batch,)``
        The solver's own status codes: how a failure is named, never whether it is one.
    atol : float or None
        None takes :func:`default_tolerance`.
    """
    tolerance = torch.full_like(_largest(y), absolute_tolerance(y.dtype, atol))
    finite = y.isfinite().all(-1)
    if residual is None:
        good, measured = finite & (reported == Status.CONVERGED), torch.full_like(tolerance, torch.nan)
        passed = torch.full_like(reported, Status.UNVERIFIED)
    else:
        measured = _largest(residual)
        if nudged_residual is not None:
            tolerance = tolerance + torch.nan_to_num(_largest(nudged_residual - residual), posinf=0.0)
        good = measured <= tolerance  # False for NaN
        finite = finite & measured.isfinite()
        passed = torch.full_like(reported, Status.CONVERGED)
    claimed = torch.where(reported == Status.CONVERGED, int(Status.FALSE_CONVERGENCE), reported)
    # An exception or a wrong shape explains the NaN it left behind better than "not finite" does.
    keeps_name = (reported == Status.SOLVER_ERROR) | (reported == Status.WRONG_SHAPE)
    keeps_name |= (reported == Status.TIMED_OUT) | (reported == Status.NO_SOLUTION)
    failed = torch.where(finite | keeps_name, claimed, int(Status.NOT_FINITE))
    return Verdict(measured, tolerance, torch.where(good & finite, passed, failed))


_MEANING = {
    Status.NOT_CONVERGED: "the solver gave up",
    Status.FALSE_CONVERGENCE: "the solver reported success, but the conditions do not hold",
    Status.NOT_FINITE: "the solution or its residual is NaN or infinite",
    Status.SOLVER_ERROR: "the solver raised an exception",
    Status.WRONG_SHAPE: "the solver returned something else than a real vector of the right length",
    Status.TIMED_OUT: "the solver was stopped",
    Status.NO_SOLUTION: "the solver proved that there is no solution",
}


def report_failures(
    info: SolveInfo, on_failure: str, cause: BaseException | None, inputs: Sequence[Tensor]
) -> None:
    """Raise or warn about failed samples, or stay silent, as ``on_failure`` says."""
    if on_failure in ("nan", "zero_grad") or bool(info.ok.all()):
        return
    message = _describe(info, inputs)
    if on_failure == "warn":
        warn_user(message, ConvergenceWarning)
        return
    raise ConvergenceError(message, info) from cause


def _describe(info: SolveInfo, inputs: Sequence[Tensor]) -> str:
    residual, tolerance = info.residual.reshape(-1), info.tolerance.reshape(-1)
    bad = [i for i, status in enumerate(info.status) if not status.ok]
    lines = [
        f"  sample {i}: {info.status[i].name}, {_MEANING.get(info.status[i], '')}; measured residual "
        f"{float(residual[i]):.4g}, tolerance {float(tolerance[i]):.1g}. {info.message[i]}".rstrip()
        for i in bad[:_SHOWN]
    ]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return "\n".join(
        [
            f"{info.solver}: {len(bad)} of {len(info.status)} samples do not satisfy the conditions at the "
            "returned solution.",
            *lines,
            *_not_finite(inputs),
            "Accepted are residuals within atol, or within what a change of y by rtol does to them. Start "
            "closer (y0=), give the solver more room "
            "(options=), or choose what failed samples become: on_failure='warn' | 'nan' | 'zero_grad'.",
        ]
    )


def _not_finite(inputs: Sequence[Tensor]) -> list[str]:
    """A sentence on inputs that are no numbers; infinity is one, of a bound that is not there."""
    numbers = [_functorch.plain(t) for t in inputs if t.is_floating_point() or t.is_complex()]
    if any(bool(t.isnan().any()) for t in numbers):
        return ["The inputs already hold NaN."]
    if any(bool(t.isinf().any()) for t in numbers):
        return ["The inputs hold infinity, which only bounds should."]
    return []
