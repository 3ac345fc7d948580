"""Ways to run a per-sample SciPy solver over a batch of y + A y³ = θ, beside the plain loop over samples.

The plain loop is what one writes without this library: SciPy once per sample, on the same torch f, with the
Jacobian by ``torch.func.jacrev`` where the method takes one. Forward solves alone, without gradients.
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


def systems(n: int, batch: int, extra: float) -> Any:
    """``extra`` seconds of waiting per call of f stand for a launch on a device, or a heavy f."""
    generator = torch.Generator().manual_seed(0)
    a = 0.5 * torch.eye(n) + 0.2 * torch.rand(n, n, generator=generator) / n
    theta = torch.randn(batch, n, generator=generator)

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
    print(f"\nauto is {info.batch}: {info.batch_reason}")
    compare(
        f"scipy.root ({method}), n = {n}, B = {batch}, {extra * 1e3:g} ms more per call of f",
        {
            "plain loop over scipy.optimize.root": lambda: plain_loop(conditions, theta, method),
            **{how: lambda how=how: solve(how) for how in hows},
        },
        quick=quick,
    )


CASES = (
    ("hybr", 2, 10, 0.0),
    ("hybr", 10, 100, 0.0),
    ("hybr", 10, 100, 3e-4),
    ("krylov", 10, 100, 0.0),
    ("df-sane", 10, 100, 0.0),
    ("krylov", 10, 1000, 0.0),
    ("krylov", 2, 1000, 0.0),
    ("hybr", 10, 1000, 0.0),
    ("hybr", 2, 1000, 0.0),
)

if __name__ == "__main__":
    quick = options().quick
    for method, n, batch, extra in CASES:
        workload(method, n, batch // 10 if quick else batch, extra, quick)
