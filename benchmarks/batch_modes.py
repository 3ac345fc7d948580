"""Ways to run a per-sample SciPy solver over a batch of y + A y³ = θ, beside the plain loop over samples.

The plain loop is what one writes without this library: SciPy once per sample, on the same torch f, with the
Jacobian by ``torch.func.jacrev`` where the method takes one. Forward solves alone, without gradients.

Two more rows tell what is to be had: SciPy's hybr with an f that costs nothing, which answers from a record
of the same solves, and ``torch.newton``, which takes whole batches.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from harness import compare, options
from scipy import optimize
from torch import Tensor

import invlayer_core as inv


def matrix(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.5 * torch.eye(n) + 0.2 * torch.rand(n, n, generator=generator) / n


def systems(n: int, batch: int, extra: float) -> Any:
    """``extra`` seconds of waiting per call of f stand for a launch on a device, or a heavy f."""
    a, theta = matrix(n), torch.randn(batch, n, generator=torch.Generator().manual_seed(1))

    def conditions(y: Tensor, theta: Tensor) -> Tensor:
        until = time.perf_counter() + extra
        while extra and time.perf_counter() < until:
            pass
        return y + (y**3) @ a.T - theta

    return conditions, theta


def plain_loop(conditions: Any, theta: Tensor, method: str) -> Tensor:
    rows = []
    for row in theta:

        def f(y: np.ndarray, row: Tensor = row) -> np.ndarray:
            return conditions(torch.from_numpy(y), row).numpy()

        def jacobian(y: np.ndarray, row: Tensor = row) -> np.ndarray:
            return torch.func.jacrev(conditions)(torch.from_numpy(y), row).numpy()

        jac = jacobian if method in ("hybr", "lm") else None
        rows.append(optimize.root(f, np.zeros(theta.shape[1]), method=method, jac=jac).x)
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def newton(conditions: Any, theta: Tensor) -> Tensor:
    return inv.root(conditions, torch.zeros_like(theta), theta, atol=1e-5)  # type: ignore[no-any-return]


def record(theta: Tensor, a: np.ndarray) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Every answer that hybr gets on its way, by sample."""
    records = []
    for row in theta.numpy():
        values: list[np.ndarray] = []
        jacobians: list[np.ndarray] = []

        def f(y: np.ndarray, row: np.ndarray = row, values: list[np.ndarray] = values) -> np.ndarray:
            values.append(y + (y**3) @ a.T - row)
            return values[-1].copy()

        def jacobian(y: np.ndarray, jacobians: list[np.ndarray] = jacobians) -> np.ndarray:
            jacobians.append(np.eye(len(y)) + a * (3 * y**2))
            return jacobians[-1].copy()

        optimize.root(f, np.zeros(len(row)), jac=jacobian)
        records.append((values, jacobians))
    return records


def replay(records: list[tuple[list[np.ndarray], list[np.ndarray]]], n: int) -> None:
    for values, jacobians in records:
        f, jacobian = iter(values).__next__, iter(jacobians).__next__
        optimize.root(lambda _, f=f: f(), np.zeros(n), jac=lambda _, j=jacobian: j())


def workload(method: str, n: int, batch: int, extra: float, quick: bool) -> None:
    conditions, theta = systems(n, batch, extra)

    def solve(how: str, info: bool = False) -> Any:
        with torch.no_grad():
            return inv.root(
                conditions,
                torch.zeros(batch, n),
                theta,
                solver="scipy.root",
                options={"method": method},
                batch=how,
                atol=1e-5,
                return_info=info,
            )

    y, info = solve("auto", info=True)
    assert torch.allclose(y, plain_loop(conditions, theta, method), atol=1e-4)
    hows = ["serial", "lockstep"] + ["stacked"] * (method == "krylov") + ["auto"]
    beside: dict[str, Any] = {}
    if method == "hybr":
        records = record(theta, matrix(n).numpy())
        beside["(SciPy alone, f for free)"] = lambda: replay(records, n)
        beside["(torch.newton, the default solver)"] = lambda: newton(conditions, theta)
    print(f"\nauto is {info.batch}: {info.batch_reason}")
    compare(
        f"scipy.root ({method}), n = {n}, B = {batch}, {extra * 1e3:g} ms more per call of f",
        {
            "plain loop over scipy.optimize.root": lambda: plain_loop(conditions, theta, method),
            **{how: lambda how=how: solve(how) for how in hows},
            **beside,
        },
        quick=quick,
    )


CASES = (
    ("hybr", 2, 10, 0.0),
    ("hybr", 10, 100, 0.0),
    ("hybr", 10, 100, 3e-4),
    ("krylov", 10, 100, 0.0),
    ("df-sane", 10, 100, 0.0),
    ("krylov", 2, 256, 0.0),
    ("hybr", 10, 1000, 0.0),
    ("hybr", 2, 1000, 0.0),
)

if __name__ == "__main__":
    quick = options().quick
    for method, n, batch, extra in CASES:
        workload(method, n, batch // 10 if quick else batch, extra, quick)
