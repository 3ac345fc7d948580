"""What a run of a solver over a batch leaves behind, whichever way the batch was run."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Size, Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.solvers.contract import SolverResult, Status
from invlayer_core.structured import Structure

__all__ = ["Outcome", "claimed_status", "is_programming_error", "message_of", "messages_of", "without_frames"]


@final
@dataclass(frozen=True)
class Outcome:
    """Solutions and claims for B samples.

    Attributes
    ----------
    y : Tensor of shape ``(B, n)``
        NaN where there is no solution.
    status : Tensor of int64, ``(B,)`` or in the batch shape
        The solver's own claim, as a Status code.
    iterations : Tensor of int64, shaped like ``status``
    message : tuple of str
        One per sample.
    cause : exception or None
        The first exception that a sample raised.
    aux : tuple of mappings
    structure : Structure or None
        Of the unknowns, where a solver function returned something else than one real tensor.
    how, why : str
        How the batch was run, and why so; empty where there is but one way.
    start : Tensor of int64, ``(B,)``, or None
        Which of several starts each sample's solution comes from; None where there was one.
    recorded : Tensor or None
        y on the graph, where the iterations were recorded.
    """

    y: Tensor
    status: Tensor
    iterations: Tensor
    message: tuple[str, ...]
    cause: BaseException | None = None
    aux: tuple[Any, ...] = ()
    structure: Structure | None = None
    without_doubts: bool = False  # whether every sample is claimed, known without a look at values
    how: str = ""
    why: str = ""
    start: Tensor | None = None
    recorded: Tensor | None = None

    @classmethod
    def without_claims(
        cls, y: Tensor, batch: Size, aux: tuple[Any, ...], structure: Structure | None = None
    ) -> Outcome:
        """What a plain function leaves: a solution, and not a word about it."""
        status = torch.zeros(batch, dtype=torch.int64, device=y.device)  # CONVERGED: not taken at its word
        silent = ("",) * batch.numel()
        return cls(y, status, status - 1, silent, None, aux, structure, without_doubts=True)


def claimed_status(success: Any, count: int, device: torch.device) -> Tensor:
    """The status codes ``(count,)`` for a solver's claim of success, a bool or a mask."""
    mask = torch.as_tensor(success, device=device).reshape(-1).expand(count)
    return torch.where(mask.bool(), int(Status.CONVERGED), int(Status.NOT_CONVERGED))


def is_programming_error(error: BaseException) -> bool:
    """Whether an exception speaks of wrong code or options rather than of a hard sample."""
    return isinstance(error, (TypeError, NameError, AttributeError, ImportError, ConditionsError))


def without_frames(error: Exception) -> Exception:
    """``error`` with its traceback as text: the frames themselves would keep the whole call alive."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    return error.with_traceback(None)


def message_of(result: SolverResult) -> str:
    """The solver's words on one line."""
    return _on_one_line(result.message)


def messages_of(result: SolverResult, count: int) -> tuple[str, ...]:
    """The words of a batched solver, one line per sample."""
    if isinstance(result.message, str) or len(result.message) != count:
        return (_on_one_line(result.message),) * count
    return tuple(map(_on_one_line, result.message))


def _on_one_line(message: object) -> str:
    return " ".join(str(message).split())
