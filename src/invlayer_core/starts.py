"""Where a solve starts: guesses that depend on the args, several starts, and warm starts.

Nothing here keeps a state. What a warm start begins from is passed in, and is what the call before returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.certificate import SolveInfo, judge, nudged
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.forward import Forward
from invlayer_core.execution.multistart import Acceptance, Multistart
from invlayer_core.implicit import Settings
from invlayer_core.structure import SystemShape

__all__ = ["Starts", "acceptance", "open_guess", "previous_solution", "starts_between"]


def open_guess(y0: Any, args: Any) -> Any:
    """y0 itself, or what it returns for ``args`` if it is a function; no gradient is recorded."""
    if isinstance(y0, Tensor) or not callable(y0):
        return y0
    with torch.no_grad():
        return y0(*args) if isinstance(args, tuple) else y0(args)


def previous_solution(called: str, warm_start: Any) -> tuple[Any, SolveInfo]:
    """The pair that ``warm_start=`` has to be.

    Raises
    ------
    ConditionsError
        If it is something else.
    """
    if type(warm_start) is tuple and len(warm_start) == 2 and isinstance(warm_start[1], SolveInfo):
        return warm_start
    raise ConditionsError(
        f"{called}: warm_start is a {type(warm_start).__name__}; accepted is None, or the pair (y, info) "
        "that the call before returned with return_info=True: only info tells which of its samples failed. "
        "A y without info goes into y0."
    )


@final
@dataclass(frozen=True)
class Starts:
    """The guesses of one call.

    Attributes
    ----------
    shape : SystemShape
        Of y.
    first : Tensor of shape ``(*batch, *event)``
        Samples that are warm start from an earlier solution, the others from y0.
    others : Tensor of shape ``(n_starts - 1, *batch, *event)``
    warm : Tensor of bool, ``(*batch,)``, or None
        Which samples are warm; None if there is no earlier solution.
    """

    shape: SystemShape
    first: Tensor
    others: Tensor
    warm: Tensor | None

    @classmethod
    def of(cls, called: str, y0: Tensor, settings: Settings) -> Starts:
        """The starts that y0 and the settings of a call make.

        Raises
        ------
        ConditionsError
            If y0 does not hold ``n_starts`` guesses, or ``warm_start`` does not fit it.
        """
        if settings.n_starts > 1:
            _check_starts(called, y0, settings.n_starts)
            first, others = y0[0], y0[1:]
        else:
            first, others = y0, y0.new_empty((0, *y0.shape))
        shape, warm = SystemShape.of(first, settings.event_dims), None
        if settings.warm_start is not None:
            y, info = previous_solution(called, settings.warm_start)
            first, warm = _warmed(called, first, shape, y, info)
        return cls(shape, first, others, warm)

    def in_turn(
        self, forward: Forward, tensors: Sequence[Tensor], system: System, settings: Settings
    ) -> tuple[Forward, tuple[Tensor, ...]]:
        """A forward that tries all starts, and its tensors, for one that takes the first."""
        first, *rest = tensors
        starts = torch.cat([first.unsqueeze(0), self.others])
        captured = system.theta[len(rest) :]  # a plain solver function is not given what F captures
        multistart = Multistart(forward, system, acceptance(settings.atol, settings.rtol))
        return multistart, (starts, *rest, *captured)


def _check_starts(called: str, y0: Tensor, n_starts: int) -> None:
    """Refuse a y0 that does not hold ``n_starts`` guesses, one after the other.

    Raises
    ------
    ConditionsError
        Naming the shape that came.
    """
    if y0.ndim == 0 or y0.shape[0] != n_starts:
        raise ConditionsError(
            f"{called}: n_starts={n_starts} came with y0 of shape {tuple(y0.shape)}; accepted is one guess "
            f"after the other, ({n_starts}, *batch, *event). inv.starts_between(lo, hi, {n_starts}) makes "
            "them within a box."
        )


def _warmed(
    called: str, start: Tensor, shape: SystemShape, y: Tensor, info: SolveInfo
) -> tuple[Tensor, Tensor]:
    """Where to start after ``(y, info)``: from the samples that converged, from ``start`` for the others.

    Parameters
    ----------
    called : str
        For messages.
    start : Tensor of shape ``(*batch, *event)``
    shape : SystemShape
        Of ``start``.
    y : Tensor of shape ``(*batch, *event)``
    info : SolveInfo

    Returns
    -------
    start : Tensor of shape ``(*batch, *event)``
    warm : Tensor of bool, ``(*batch,)``
        Which samples start from ``y``.

    Raises
    ------
    ConditionsError
        If ``y`` is not of that shape, or on another device.
    """
    if y.shape != start.shape or info.ok.shape != shape.batch or y.device != start.device:
        raise ConditionsError(
            f"{called}: warm_start holds y of shape {tuple(y.shape)} on {y.device} and info for a batch "
            f"{tuple(info.ok.shape)}; accepted is y in the shape of the start, {tuple(start.shape)} on "
            f"{start.device}, with info for a batch {tuple(shape.batch)}. If the batch has changed, leave "
            "warm_start out of one call."
        )
    y = y.detach().to(start.dtype)
    warm = info.ok & shape.vectors(y).isfinite().all(-1)
    return torch.where(warm.reshape((*shape.batch, *(1 for _ in shape.event))), y, start), warm


def acceptance(atol: float | None, rtol: float | None) -> Acceptance:
    """Which samples a start has solved, by the certificate's own measure, and ‖F‖∞ of each; both ``(B,)``."""

    def accept(system: System, y: Tensor, theta: Sequence[Tensor], status: Tensor) -> tuple[Tensor, Tensor]:
        shape = system.shape
        flat = shape.vectors(y)
        residual, beside = (_measured(system, point, theta) for point in (flat, nudged(flat, rtol)))
        verdict = judge(flat, residual, beside, status.reshape(shape.batch), atol)
        return verdict.ok.reshape(-1), verdict.residual.reshape(-1)

    return accept


def _measured(system: System, flat: Tensor, theta: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        residual = system.residual(flat.reshape(system.shape.full), theta)
    system.check_residual(residual)
    return system.shape.vectors(residual)


def starts_between(
    lo: Tensor | Sequence[float], hi: Tensor | Sequence[float], n_starts: int, *, seed: int = 0
) -> Tensor:
    """``n_starts`` guesses spread evenly over a box, for ``n_starts=``.

    They are a scrambled Sobol sequence over the last dimension (Owen, J. Complexity 14 (1998) 466), the same
    one for every sample of a batch, and the same in each call.

    Parameters
    ----------
    lo, hi : Tensor of shape ``(*batch, n)``, or numbers
        Ends of the box; they broadcast. They tell dtype and device.
    n_starts : int
    seed : int
        Another one gives other points.

    Returns
    -------
    Tensor of shape ``(n_starts, *batch, n)``

    Raises
    ------
    ConditionsError
        If ``n_starts`` is no positive integer, or ``lo`` and ``hi`` are no real floating-point numbers.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> y0 = inv.starts_between(torch.tensor([-3.0]), torch.tensor([3.0]), 8)
    >>> _, info = inv.root(lambda y: y.exp() - y.square() - 4, y0, n_starts=8, return_info=True)
    >>> bool(info.ok)
    True
    """
    if not isinstance(n_starts, int) or isinstance(n_starts, bool) or n_starts < 1:
        raise ConditionsError(f"starts_between(n_starts={n_starts!r}): accepted is an integer >= 1.")
    lower, upper = torch.broadcast_tensors(torch.as_tensor(lo), torch.as_tensor(hi))
    if not (lower.is_floating_point() and upper.is_floating_point()):
        raise ConditionsError(
            f"starts_between: lo and hi have dtypes {lower.dtype} and {upper.dtype}; accepted are real "
            "floating-point ones."
        )
    size = lower.shape[-1] if lower.ndim else 1
    points = torch.quasirandom.SobolEngine(max(size, 1), scramble=True, seed=seed).draw(n_starts).to(lower)
    points = points[:, :size].reshape(n_starts, *(1 for _ in lower.shape[:-1]), *lower.shape[-1:])
    return lower + (upper - lower) * points
