"""When two derivatives agree, when a difference has an innocent cause, and when one of them is wrong."""

from __future__ import annotations

from dataclasses import replace

from invlayer_core.diagnostics.report import CheckRow, RowVerdict
from invlayer_core.diagnostics.trial import Trial

__all__ = ["RANK", "in_words", "judge", "rounding_limit", "unavailable"]

RANK: dict[RowVerdict, int] = {"not available": -1, "ok": 0, "suspicious": 1, "wrong": 2}

_LITTLE = 1e-2  # a comparison that leaves more than this open proves little
_UNSETTLED = 0.1  # and from here on it proves nothing
_SOLVER = 100.0  # by how much more than y itself each derivative may be off


def unavailable(name: str, why: str) -> CheckRow:
    """A row that could not be measured."""
    return CheckRow(name, "not available", detail=why)


def rounding_limit(trial: Trial) -> float:
    """What rounding leaves open between two exact rules."""
    return min(1e3 * trial.eps * trial.condition, 1e-3) if trial.eps < 1e-9 else 1e3 * trial.eps


def judge(error: float, open_: float, trial: Trial, order: int = 1) -> tuple[RowVerdict, float]:
    """A verdict on a relative error where ``open_`` cannot be told from zero; and the tolerance.

    An error is only wrong if neither the differences, nor the solver's distance from the root, nor rounding
    through an ill-conditioned J can explain it.
    """
    close = trial.close(order)
    limit = max(close, 2 * open_)
    if error <= limit:
        return ("suspicious" if limit > max(_LITTLE, close) else "ok"), limit
    explained = max(_SOLVER**order * trial.solver_error, 10 * trial.eps * trial.condition)
    if open_ > _UNSETTLED or error <= explained:
        return "suspicious", limit
    return "wrong", limit


def in_words(row: CheckRow, open_: float, agrees: str) -> CheckRow:
    """A comparison's detail: what was compared, or why it says little."""
    if row.verdict == "ok":
        return replace(row, detail=agrees)
    if open_ > _LITTLE / 2:
        return replace(row, detail=f"finite differences do not settle: they leave {open_:.0e} open")
    if row.verdict == "suspicious":
        return replace(
            row, detail=f"{agrees}: no more than the solver's error, or ill-conditioning, explains"
        )
    return replace(row, detail=f"{agrees} differ")
