"""Many scalar equations, forward and backward, call after call: nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from tests.memory.layers import cubic, rand
from tests.memory.test_flat import Conditions, assert_flat, outlives

import invlayer_core as inv


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize(
    ("solver", "batch", "count", "calls"),
    [
        ("scipy.find_root", "auto", 5000, 30),
        ("scipy.brentq", "serial", 100, 14),
        ("scipy.brentq", "lockstep", 100, 14),
    ],
)
def test_memory_is_flat(solver: str, batch: inv.implicit.BatchMode, count: int, calls: int) -> None:
    x = rand(count)

    def step() -> None:
        y = inv.root(
            cubic, torch.ones(count, dtype=torch.float64), x, solver=solver,
            options={"bracket": (-3.0, 3.0)}, event_dims=0, batch=batch,
        )  # fmt: skip
        torch.autograd.grad(y.sin().sum(), x)

    assert_flat(step, calls)


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize("batch", ["serial", "lockstep"])
@pytest.mark.parametrize("method", ["hybr", "lm", "broyden1", "krylov", "df-sane", "brentq"])
def test_nothing_outlives_what_scipy_keeps(method: str, batch: inv.implicit.BatchMode) -> None:
    """SciPy's wrappers refer to themselves: whatever they hold lives until garbage is collected."""
    x = rand(12)

    def run(f: Conditions) -> None:
        scalar = method == "brentq"
        inv.root(
            f, torch.ones(12, dtype=torch.float64), x, solver="scipy.brentq" if scalar else "scipy.root",
            options={"bracket": (-3.0, 3.0)} if scalar else {"method": method}, event_dims=0, batch=batch,
            atol=1e-4,
        )  # fmt: skip

    assert not outlives(run)
