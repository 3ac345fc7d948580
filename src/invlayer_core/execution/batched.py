"""Run a solver that takes the whole batch at once, in torch, where the tensors live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from invlayer_core.execution.outcome import (
    Outcome,
    claimed_status,
    is_programming_error,
    messages_of,
    without_frames,
)
from invlayer_core.solvers.contract import BatchProblem, Solver, SolverResult, Status
from invlayer_core.solvers.quadratic import BatchQuadraticProblem

__all__ = ["run_batched"]


def run_batched(
    solver: Solver,
    problem: BatchProblem | BatchQuadraticProblem,
    y0: Tensor,
    options: Mapping[str, Any],
    *,
    recorded: bool = False,
) -> Outcome:
    """One call of ``solve`` for all samples; ``recorded`` keeps its result on the graph, too.

    An exception fails the whole batch: nothing tells which sample it came from.
    """
    try:
        result: Any = solver.solve(problem, y0.clone(), dict(options))
    except Exception as error:
        if is_programming_error(error) or _is_of_checkpoint(error):
            raise
        return _failed(y0, Status.SOLVER_ERROR, f"{type(error).__name__}: {error}", without_frames(error))
    if not isinstance(result, SolverResult):
        return _failed(
            y0, Status.WRONG_SHAPE, f"solve() returned {type(result).__name__}, not a SolverResult."
        )
    if not isinstance(result.y, Tensor) or result.y.shape != y0.shape or not result.y.is_floating_point():
        shape = tuple(getattr(result.y, "shape", ()))
        return _failed(
            y0, Status.WRONG_SHAPE, f"SolverResult.y has shape {shape}; accepted is a real {tuple(y0.shape)}."
        )
    count = problem.batch
    return Outcome(
        y=result.y.detach().to(y0),
        status=claimed_status(result.success, count, y0.device),
        iterations=torch.as_tensor(result.iterations, device=y0.device).reshape(-1).expand(count).long(),
        message=messages_of(result, count),
        aux=(result.aux,),
        recorded=result.y.to(y0) if recorded else None,
    )


def _is_of_checkpoint(error: Exception) -> bool:
    """Whether it is torch's way to end the recomputation of recorded iterations."""
    return type(error).__module__ == "torch.utils.checkpoint"


def _failed(y0: Tensor, status: Status, message: str, cause: BaseException | None = None) -> Outcome:
    count = y0.shape[0]
    codes = torch.full((count,), int(status), device=y0.device)
    return Outcome(
        torch.full_like(y0, torch.nan), codes, torch.full_like(codes, -1), (message,) * count, cause, ()
    )
