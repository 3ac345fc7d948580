"""What must not go through on the device: each of these has to be stopped, or the harness proves nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from tests.devices.scenarios import (
    SCENARIOS,
    Scenario,
    conditions,
    derivatives,
    jacobian,
    problem,
    rand,
)
from torch import Tensor

import invlayer_core as inv
from invlayer_core.adjoints import Implicit

CONSTANT = torch.tensor([1.0, 2.0], dtype=torch.float64)  # made before any mode: a true CPU tensor


def _with_f(f: Callable[..., Tensor], **keywords: Any) -> Scenario:
    def run(device: str) -> list[Tensor]:
        y0, a, b = problem(device, 3)
        return derivatives(inv.root(f, y0, (a, b), **keywords), a, b)

    return run


def _constant_made_inside(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return conditions(y, a, b) + 0.1 * torch.tensor([1.0, 2.0], dtype=torch.float64)


def _constant_from_outside(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return conditions(y, a, b) + 0.1 * CONSTANT


def _jacobian_on_the_cpu(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return jacobian(y, a, b).cpu()


def _through_numpy(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y.detach().numpy()
    return conditions(y, a, b)


def _forgets_device(name: str) -> AbstractContextManager[Any]:
    """``torch.eye`` and the like, as if the engine (and no one else) had not passed ``device=``."""
    function = getattr(torch, name)

    def forgetful(*args: Any, **kwargs: Any) -> Tensor:
        if sys._getframe(1).f_globals["__name__"].startswith("invlayer_core"):
            kwargs.pop("device", None)
        return function(*args, **kwargs)

    return mock.patch.object(torch, name, forgetful)


def _broken_engine(op: str, scenario: str) -> Scenario:
    def run(device: str) -> list[Tensor]:
        with _forgets_device(op):
            return SCENARIOS[scenario](device)

    return run


def _mixed_devices(device: str) -> list[Tensor]:
    return [inv.root(conditions, torch.zeros(3, 2, dtype=torch.float64), (rand(device, 2), rand(device, 2)))]


def _coupled(device: str) -> list[Tensor]:
    return _with_f(lambda y, a, b: conditions(y, a, b) + 0.1 * y.mean(0), solver=_ready)(device)


def _ready(y0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The solution of the coupled conditions by plain Newton on the whole batch as one system."""
    f = lambda y: (conditions(y, a, b) + 0.1 * y.mean(0)).flatten()  # noqa: E731
    y = y0
    for _ in range(20):
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            rows = [torch.autograd.grad(row, point, retain_graph=True)[0].flatten() for row in f(point)]
        y = y - torch.linalg.solve(torch.stack(rows), f(y)).reshape(y.shape)
    return y


def _double_root(device: str) -> list[Tensor]:
    b = rand(device, 3, 2)
    solve = inv.implicit_function(lambda y, b: (y - b) ** 2, adjoint=Implicit("raise"))(lambda b: b.clone())
    return list(torch.autograd.grad(solve(b).sum(), b))


def _no_root(device: str) -> list[Tensor]:
    b = rand(device, 3, 2)
    return [inv.root(lambda y, b: y**2 + b, torch.ones_like(b).detach(), b, options={"maxiter": 5})]


_TWO_DEVICES = r"two different devices|(expected|same) device|on device|device type"

CONTROLS: dict[str, tuple[Scenario, str]] = {
    "constant_made_inside": (_with_f(_constant_made_inside), _TWO_DEVICES),
    "constant_from_outside": (_with_f(_constant_from_outside), _TWO_DEVICES),
    "jacobian_on_the_cpu": (_with_f(conditions, jacobian=_jacobian_on_the_cpu), _TWO_DEVICES),
    "numpy_of_a_device_tensor": (_with_f(_through_numpy), r"can't convert \w+(:0)? tensor to numpy"),
    "engine_forgets_eye": (_broken_engine("eye", "failed_analytic_jacobian"), _TWO_DEVICES),
    "engine_forgets_ones": (_broken_engine("ones", "implicit_function"), _TWO_DEVICES),
    "engine_forgets_zeros_in_newton": (_broken_engine("zeros", "newton"), _TWO_DEVICES),
    "engine_forgets_zeros": (_broken_engine("zeros", "polish"), _TWO_DEVICES),
}

REFUSALS: dict[str, tuple[Scenario, str]] = {
    "mixed_devices": (_mixed_devices, r"ConditionsError: root: y0 is on cpu but tensor 0 of args"),
    "coupled": (_coupled, r"ConditionsError: the conditions mix the samples of the batch \(3,\)"),
    "double_root": (_double_root, r"SingularJacobianError: .* singular at the solution of sample 0"),
    "no_root": (_no_root, r"ConvergenceError: torch.newton: 3 of 3 samples .*NOT_CONVERGED"),
}
