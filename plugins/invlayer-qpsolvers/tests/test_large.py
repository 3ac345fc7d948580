"""Sparse programs of ten and a hundred thousand variables: gradients against exact ones, on the pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
TOLERANCES = {
    "clarabel": {"tol_gap_abs": 1e-6, "tol_gap_rel": 1e-6, "tol_feas": 1e-6},
    "piqp": {"eps_abs": 1e-6, "eps_rel": 1e-6},
}
SIZES = [1000, pytest.param(10_000, marks=pytest.mark.slow)]
LARGE = [1000, pytest.param(100_000, marks=pytest.mark.slow)]


def identity(n: int, value: float = 1.0) -> Tensor:
    places = torch.arange(n).repeat(2, 1)
    return torch.sparse_coo_tensor(places, torch.full((n,), value).double(), (n, n), is_coalesced=True)


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-6 * max(1.0, float(wanted.abs().max())))


def runs_of(tied: np.ndarray) -> np.ndarray:
    """The number of the run that each z belongs to: neighbours whose constraint is active share one."""
    return np.concatenate([[0], np.cumsum(~tied)])


@pytest.mark.parametrize("way", ["short", "general"])
@pytest.mark.parametrize("solver", TOLERANCES)
@pytest.mark.parametrize("n", SIZES)
def test_chain(n: int, solver: str, way: str) -> None:
    """min ½‖z − c‖² with |z_i − z_{i+1}| ≤ 1.

    Along a run of active constraints z is c's mean but for known offsets, and its multipliers are sums of
    z − c: both are checked to be optimal in themselves, so that the active set is exact.
    """
    c = torch.from_numpy(3 * np.random.default_rng(0).normal(size=n)).requires_grad_()
    i, one = torch.arange(n - 1), torch.ones(n - 1).double()
    rows = torch.cat([i, i, i + n - 1, i + n - 1])
    columns = torch.cat([i, i + 1, i, i + 1])
    G = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), torch.cat([one, -one, -one, one]), (2 * n - 2, n)
    ).coalesce()
    G.requires_grad_()
    h = torch.ones(2 * n - 2).double().requires_grad_()
    keywords = {"atol": 1e-6} if way == "general" else {}
    z, found = inv.qp(
        identity(n), -c, G, h, solver=f"qpsolvers.{solver}", options=TOLERANCES[solver],
        return_multipliers=True, **keywords,
    )  # fmt: skip
    up, down = (found.inequalities > 0).numpy().reshape(2, n - 1)
    run = runs_of(up | down)
    steps = np.concatenate([[0.0], np.cumsum(up.astype(float) - down)])  # z_0 − z_i within a run
    counts = np.bincount(run)
    wanted = (np.bincount(run, c.detach().numpy() + steps) / counts)[run] - steps
    assert np.abs(z.detach().numpy() - wanted).max() <= 1e-9
    forces = np.cumsum(c.detach().numpy() - wanted)[:-1]
    assert (forces[up] > 0).all()
    assert (forces[down] < 0).all()
    assert (np.abs(np.diff(wanted)) <= 1 + 1e-12).all()
    weights = torch.cos(torch.arange(n).double())
    (z @ weights).backward()
    mean = torch.from_numpy((np.bincount(run, weights.numpy()) / counts)[run])
    assert close(c.grad, mean)
    pulls = np.cumsum((weights - mean).numpy())[:-1]
    assert close(
        h.grad, torch.from_numpy(np.concatenate([np.where(up, pulls, 0), np.where(down, -pulls, 0)]))
    )
    multipliers = np.concatenate([np.where(up, forces, 0), np.where(down, -forces, 0)])
    row, column = G.detach().indices()
    multiplier = torch.from_numpy(multipliers)[row]
    exact = -(h.grad[row] * z.detach()[column] + multiplier * mean[column])
    assert G.grad.layout is torch.sparse_coo
    assert close(G.grad.coalesce().values(), exact)


@pytest.mark.parametrize("solver", TOLERANCES)
@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("n", LARGE)
def test_simplex(n: int, as_rows: bool, solver: str) -> None:
    """The projection onto the simplex, known by sorting (Held, Wolfe & Crowder 1974)."""
    c = torch.from_numpy(np.random.default_rng(0).normal(size=n)).requires_grad_()
    A = torch.ones(1, n).double().to_sparse()
    b = torch.ones(1).double().requires_grad_()
    zero = torch.zeros(n).double()
    bound = {"G": identity(n, -1.0), "h": zero} if as_rows else {"lb": zero}
    x = inv.qp(identity(n), -c, A=A, b=b, **bound, solver=f"qpsolvers.{solver}", options=TOLERANCES[solver])
    falling = np.sort(c.detach().numpy())[::-1]
    thresholds = (np.cumsum(falling) - 1) / np.arange(1, n + 1)
    threshold = thresholds[np.nonzero(falling > thresholds)[0][-1]]
    wanted = (c.detach() - threshold).clamp(min=0)
    assert (x - wanted).abs().max() <= 1e-9
    weights = torch.cos(torch.arange(n).double())
    (x @ weights).backward()
    support = wanted > 0
    mean = weights[support].mean()
    assert close(c.grad, torch.where(support, weights - mean, 0.0))
    assert close(b.grad, mean.reshape(1))
