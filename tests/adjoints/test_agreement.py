"""All adjoints on one problem: implicit, unrolled, truncated (k large) and DLM (ε → 0) agree.

Twice: residuals that are linear in y, and residuals that are quadratic in y (a quartic cost), neither of
which vanish at the solution; each undamped, by Gauss–Newton, and damped, by Levenberg–Marquardt. The judge is
central differences of the layer's own values, to the digits that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.adjoints import DLM, Adjoint, Implicit, Truncated, Unrolled

pytestmark = pytest.mark.usefixtures("float64")

Problem = tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]


def quadratic() -> Problem:
    """½ ‖A y − b‖², A 6×3, with weights: linear least squares."""
    A, b, w = torch.randn(6, 3), torch.randn(4, 6), torch.rand(6) + 0.5
    return (lambda y, A, b, w: w * (y @ A.T - b)), torch.zeros(4, 3), (A, b, w)


def quartic() -> Problem:
    """Residuals yᵢ² − aᵢ, yᵢ − cᵢ and y₁ y₂ − d, that cannot all be zero."""
    a, c, d = 1 + torch.rand(4, 3), 1 + 0.3 * torch.rand(4, 3), torch.tensor(0.7)

    def residuals(y: Tensor, a: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.cat([y**2 - a, y - c, y[..., :1] * y[..., 1:2] - d], -1)

    return residuals, torch.ones(4, 3), (a, c, d)


PROBLEMS = {"quadratic": quadratic, "quartic": quartic}
WAYS: dict[str, dict[str, Any]] = {
    "undamped": {"solver": "torch.gauss_newton"},
    "undamped, in a trust region": {"solver": "torch.dogleg"},
    "damped": {"solver": "torch.levenberg_marquardt", "options": {"damping": 0.1}},
    # Recorded iterations lag behind: unrolled, y has to come much nearer than it need for itself.
    "damped throughout": {
        "solver": "torch.levenberg_marquardt",
        "options": {"damping": 0.1, "safeguard": False, "xtol": 1e-15, "maxiter": 60},
    },
}
ADJOINTS: dict[str, tuple[Adjoint, float]] = {
    "implicit": (Implicit(), 1e-9),
    "unrolled": (Unrolled(), 1e-6),
    "truncated": (Truncated(60), 1e-9),
    "dlm": (DLM(1e-5, central=True), 1e-8),
    "dlm, resolved": (DLM(1e-3, central=True, resolve=True), 1e-4),
}


def gradients(problem: Problem, way: str, adjoint: Adjoint) -> tuple[Tensor, ...]:
    residuals, start, args = problem
    leaves = [arg.clone().requires_grad_() for arg in args]
    y = inv.least_squares(residuals, start, tuple(leaves), adjoint=adjoint, **WAYS[way])
    return torch.autograd.grad((y * torch.linspace(-1, 2, 12).reshape(4, 3)).sum(), leaves)


def differences(problem: Problem, step: float = 1e-5) -> tuple[Tensor, ...]:
    """The same by central differences of solutions polished to rounding."""
    residuals, start, args = problem
    weights = torch.linspace(-1, 2, 12).reshape(4, 3)

    def value(args: tuple[Tensor, ...]) -> float:
        y = inv.least_squares(residuals, start, args, solver="torch.gauss_newton", polish="auto")
        return float((y * weights).sum())

    found = []
    for i, arg in enumerate(args):
        gradient = torch.zeros(arg.numel())
        for k in range(arg.numel()):
            push = torch.zeros(arg.numel())
            push[k] = step
            ends = [
                value((*args[:i], arg + sign * push.reshape(arg.shape), *args[i + 1 :])) for sign in (1, -1)
            ]
            gradient[k] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient.reshape(arg.shape))
    return tuple(found)


@pytest.mark.parametrize("name", PROBLEMS)
def test_implicit_is_the_derivative_of_the_layer(name: str) -> None:
    problem = PROBLEMS[name]()
    for ours, theirs in zip(gradients(problem, "undamped", Implicit()), differences(problem), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_adjoints_agree(name: str, way: str, adjoint: str) -> None:
    problem = PROBLEMS[name]()
    rule, tolerance = ADJOINTS[adjoint]
    ours, theirs = gradients(problem, way, rule), gradients(problem, "undamped", Implicit())
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize("solver", ["torch.lbfgs", "torch.gauss_newton"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_unrolled_follows_its_solver(name: str, solver: str) -> None:
    """What a superlinear method gains in y it gains in dy/dθ some iterations later."""
    residuals, start, args = PROBLEMS[name]()
    leaves = [arg.clone().requires_grad_() for arg in args]
    found = []
    for adjoint in (Unrolled(), Implicit()):
        y = inv.least_squares(residuals, start, tuple(leaves), solver=solver, adjoint=adjoint)
        found.append(torch.autograd.grad(y.sum(), leaves))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_a_gauss_newton_stand_in_would_not_agree() -> None:
    """The problem can tell: without second derivatives the gradient is off by more than a hundredth."""
    problem = quartic()
    ours = gradients(problem, "undamped", DLM(1e-5, central=True, hessian="gauss_newton"))
    theirs = gradients(problem, "undamped", Implicit())
    assert (
        max(float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True))
        > 1e-2
    )
