"""Problems as the engine would hand them to a solver, for calling ``solve`` directly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invlayer_core.functional.batch_jacobian import batch_jacobian
from invlayer_core.solvers import BatchProblem, Problem, SampleProblem
from invlayer_core.testing.zoo import Case, HalfNorm, HalfSquare

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
    function, parts = _conditions(case, kind)

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
        parts,
    )


def _conditions(
    case: Case, kind: str
) -> tuple[Callable[[Tensor], Tensor], dict[str, Callable[[Tensor], Tensor]]]:
    """F, and what the kind has beside it."""
    posed = case.posed(kind)
    if kind == "root":
        return (lambda y: posed(y, *case.args)), {}
    if kind == "fixed_point":
        return (lambda y: posed(y, *case.args) - y), {}
    known: dict[str, Callable[..., Tensor]] = {"minimize": posed, "nlp": HalfNorm()}
    objective = known.get(kind, HalfSquare(posed))
    parts: dict[str, Callable[..., Tensor]] = {"objective": objective}
    if kind in ("least_squares", "nlp"):
        parts["residuals" if kind == "least_squares" else "equalities"] = posed
    named: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, part in parts.items():
        named[name] = partial(_value, part, case)
        named[f"{name}_jacobian"] = partial(_row if name == "objective" else _jacobian, part, case)
    return partial(_gradient, objective, case), named


def _value(part: Callable[..., Tensor], case: Case, y: Tensor) -> Tensor:
    with torch.no_grad():
        return part(y, *case.args)


def _jacobian(part: Callable[..., Tensor], case: Case, y: Tensor) -> Tensor:
    return batch_jacobian(lambda point: part(point, *case.args), y.detach())


def _row(objective: Callable[..., Tensor], case: Case, y: Tensor) -> Tensor:
    """The Jacobian of an objective, which is one equation: ``(B, 1, n)``."""
    return _gradient(objective, case, y.detach()).unsqueeze(-2)


def _gradient(objective: Callable[..., Tensor], case: Case, y: Tensor) -> Tensor:
    recorded = torch.is_grad_enabled() and y.requires_grad
    with torch.enable_grad():
        point = y if recorded else y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(objective(point, *case.args).sum(), point, create_graph=recorded)
    return slope


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
        {name: of_vector(part) for name, part in problem.parts.items()},
        torch.finfo(case.start.dtype).eps,
    )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return array
