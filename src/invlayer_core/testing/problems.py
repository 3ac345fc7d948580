"""Problems as the engine would hand them to a solver, for calling ``solve`` directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invlayer_core.functional.batch_jacobian import batch_jacobian
from invlayer_core.solvers import BatchProblem, Problem, SampleProblem
from invlayer_core.testing.zoo import Case

if TYPE_CHECKING:
    import numpy as np

__all__ = ["batch_problem", "pose", "sample_problem"]


def pose(case: Case, kind: str, *, batched: bool) -> list[tuple[Problem, Any]]:
    """Every problem of a case with its initial guess: one for a batched solver, else one per system."""
    if batched:
        return [(batch_problem(case, kind), case.start.clone())]
    return [(sample_problem(case, kind, i), _to_numpy(case.start[i])) for i in range(case.start.shape[0])]


def batch_problem(case: Case, kind: str) -> BatchProblem:
    """A case of shape ``(B, n)`` for a batched solver."""
    posed = case.posed(kind)
    subtrahend = 1.0 if kind == "fixed_point" else 0.0  # F(y) = T(y) − y

    def function(y: Tensor) -> Tensor:
        return posed(y, *case.args) - subtrahend * y

    def residual(y: Tensor) -> Tensor:
        with torch.no_grad():
            return function(y)

    batch, size = case.start.shape
    return BatchProblem(
        kind,
        size,
        batch,
        residual,
        lambda y: batch_jacobian(function, y.detach()),
        lambda y: _second_derivative(function, y),
    )


def _second_derivative(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """d²F/dy² of scalar equations, ``(B, 1)``."""
    slope = lambda y: batch_jacobian(function, y, create_graph=True).squeeze(-1)  # noqa: E731
    return batch_jacobian(slope, y.detach()).squeeze(-1)


def sample_problem(case: Case, kind: str, index: int) -> SampleProblem:
    """System ``index`` of a case of shape ``(B, n)``, for a per-sample solver."""
    problem = batch_problem(case.select(slice(index, index + 1)), kind)

    def of_vector(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda y: _to_numpy(function(torch.as_tensor(y).to(case.start).reshape(1, -1))[0])

    return SampleProblem(
        kind,
        problem.size,
        index,
        of_vector(problem.residual),
        of_vector(problem.jacobian),
        of_vector(problem.second_derivative),
    )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return array
