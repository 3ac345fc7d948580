"""A per-sample SciPy solver over a batch of y + A y³ = θ: lockstep beside one sample after the other."""

from __future__ import annotations

import time

import torch
from harness import compare, options
from torch import Tensor

import invlayer_core as inv


def workload(n: int, batch: int, extra: float, quick: bool) -> None:
    """``extra`` seconds of waiting per call of f stand for a launch on a device, or a heavy f."""
    generator = torch.Generator().manual_seed(0)
    a = 0.5 * torch.eye(n) + 0.2 * torch.rand(n, n, generator=generator) / n
    theta = torch.randn(batch, n, generator=generator)

    def conditions(y: Tensor) -> Tensor:
        until = time.perf_counter() + extra
        while time.perf_counter() < until:
            pass
        return y + (y**3) @ a.T - theta

    def solve(how: str) -> Tensor:
        with torch.no_grad():
            return inv.root(conditions, torch.zeros(batch, n), solver="scipy.root", batch=how)  # type: ignore[no-any-return]

    assert torch.equal(solve("serial"), solve("lockstep"))
    compare(
        f"scipy.root (hybr), n = {n}, B = {batch}, {extra * 1e3:g} ms more per call of f",
        {"lockstep": lambda: solve("lockstep"), "serial": lambda: solve("serial")},
        quick=quick,
    )


if __name__ == "__main__":
    quick = options().quick
    for n, batch, extra in ((2, 10, 0.0), (10, 100, 0.0), (10, 100, 3e-4)):
        workload(n, batch, extra, quick)
