"""Constrained problems with several starts: of what satisfies the conditions, the best objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

STARTS = torch.tensor([[-1.5, 0.0], [0.4, 0.0], [1.5, 0.0]], dtype=torch.float64)


def objective(y: Tensor, p: Tensor) -> Tensor:
    """Two valleys in the first unknown; p tilts them, and tells what the second is drawn to."""
    a, b = y.unbind(-1)
    return (a.square() - 1).square() + p[..., 0] * a + 0.5 * (b - p[..., 1]).square()


def sum_is_one(y: Tensor, p: Tensor) -> Tensor:
    return y.sum(-1, keepdim=True) - 1


def slopes(a: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f′ and f″ along the constraint, b = 1 − a."""
    return 4 * a * (a**2 - 1) + p[..., 0] - (1 - a - p[..., 1]), 12 * a**2 - 4 + 1.0


def descend(a: np.ndarray, p: np.ndarray, steps: int = 400) -> np.ndarray:
    for _ in range(steps):
        first, second = slopes(a, p)
        a = a - np.clip(first / np.maximum(np.abs(second), 1.0), -0.2, 0.2)
    return a


@inv.from_numpy
def local(y0: np.ndarray, p: np.ndarray) -> np.ndarray:
    """An opaque descent from where it is put."""
    a = descend(y0[..., 0], p)
    return np.stack([a, 1 - a], -1)


@inv.from_numpy
def rough(y0: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The same to three digits: no point satisfies the conditions before it is polished."""
    a = descend(y0[..., 0], p) + 1e-3
    return np.stack([a, 1 - a + 1e-3], -1)


def batch() -> Tensor:
    return torch.tensor([[0.6, 0.5], [-0.9, 1.2], [0.1, -0.4]])


def best(p: np.ndarray) -> np.ndarray:
    """The lowest minimum, from a grid."""
    a = descend(np.linspace(-2, 2, 41)[:, None], p[None])
    value = (a**2 - 1) ** 2 + p[:, 0] * a + 0.5 * (1 - a - p[:, 1]) ** 2
    a = a[value.argmin(0), np.arange(len(p))]
    return np.stack([a, 1 - a], -1)


def solve(p: Tensor, solver: Any = local, starts: Tensor = STARTS, **keywords: Any) -> Any:
    y0 = starts.reshape(-1, *(1 for _ in p.shape[:-1]), 2).expand(-1, *p.shape[:-1], 2)
    y0 = y0 if len(starts) > 1 else y0[0]
    keywords = {"n_starts": len(starts), "eq": sum_is_one, **keywords}
    return inv.nlp(objective, y0, p, solver=solver, **keywords)


@pytest.mark.parametrize("solver", [local, rough])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_best_feasible_minimum_wins(solver: Any, order: list[int]) -> None:
    p = batch()
    y, info = solve(p, solver, STARTS[order], return_info=True)
    torch.testing.assert_close(y, torch.from_numpy(best(p.numpy())), rtol=1e-9, atol=1e-9)
    assert bool(info.ok.all())
    worst = {0: 2, 1: 0}  # the valley that is not the lowest
    for sample, start in worst.items():
        assert order[int(info.start[sample])] != start
    assert info.polish.min() > 0 or solver is local


def test_one_start_may_miss_it() -> None:
    p = batch()
    y = solve(p, starts=STARTS[2:])
    assert float((y - torch.from_numpy(best(p.numpy()))).abs().amax()) > 1


def test_derivative_is_that_of_the_winner() -> None:
    """By the reduced second derivative, and by differences of the whole."""
    p = batch().requires_grad_()
    y, multipliers = solve(p, return_multipliers=True)
    (found,) = torch.autograd.grad(y[:, 0].sum(), p)
    a = y.detach()[:, 0].numpy()
    expected = -torch.from_numpy(
        np.stack([np.ones(3), np.ones(3)], -1) / slopes(a, p.detach().numpy())[1][:, None]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(lambda p: solve(p, return_multipliers=True)[1].equalities, p)
    torch.testing.assert_close(multipliers.equalities[:, 0], y[:, 1] - p[:, 1], rtol=1e-9, atol=1e-10)


def test_infeasible_points_do_not_win() -> None:
    """A start from which the solver leaves the constraint, to where the objective is much lower."""

    @inv.from_numpy
    def cheating(y0: np.ndarray, p: np.ndarray) -> np.ndarray:
        y = local.function(y0, p)
        return np.where(y0[..., :1] < -1, y + np.array([3.0, np.nan]), y)

    p = batch()
    y, info = solve(p, cheating, return_info=True)
    assert bool(info.ok.all())
    assert bool((info.start != 0).all())
    torch.testing.assert_close(y.sum(-1), torch.ones(3), rtol=0, atol=1e-9)


def test_a_sample_without_any_solution_is_told() -> None:
    never = inv.from_numpy(lambda y0, p: np.full_like(y0, np.nan))
    with pytest.raises(inv.ConvergenceError, match="3 of 3 samples"):
        solve(batch(), never)


def test_guesses_from_args_and_by_name() -> None:
    p = batch().requires_grad_()
    joined = lambda y: torch.cat([y["a"], y["b"]], -1)  # noqa: E731
    split = lambda y: {"a": y[..., :1], "b": y[..., 1:]}  # noqa: E731
    named = inv.nlp(
        lambda y, p: objective(joined(y), p),
        lambda p: split(STARTS[:, None].expand(3, len(p), 2)),
        p,
        eq=lambda y, p: y["a"] + y["b"] - 1,
        solver=lambda y0, p: split(local(joined(y0), p)),
        n_starts=3,
    )
    y = solve(p)
    torch.testing.assert_close(joined(named), y, rtol=1e-9, atol=1e-9)
    slopes_of = [torch.autograd.grad(value.sum(), p)[0] for value in (named["a"], y[:, 0])]
    torch.testing.assert_close(*slopes_of, rtol=1e-8, atol=1e-9)


def test_warm_start_is_one_of_the_starts() -> None:
    """It takes the place of the first, and is taken where the others find nothing better."""
    p = batch()
    previous = solve(p, starts=STARTS[2:], return_info=True)
    y, info = solve(p, starts=STARTS[[1, 0]], warm_start=previous, return_info=True)
    torch.testing.assert_close(y, torch.from_numpy(best(p.numpy())), rtol=1e-9, atol=1e-9)
    assert info.start.tolist() == [1, -1, -1]


def test_mapped_slices_choose_for_themselves() -> None:
    p = batch()
    y = torch.func.vmap(solve)(p)
    torch.testing.assert_close(y, solve(p), rtol=1e-9, atol=1e-9)
    found = torch.func.vmap(torch.func.jacrev(solve))(p)
    leaf = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad(solve(leaf).sum(), leaf)
    torch.testing.assert_close(found.sum(1), expected, rtol=1e-8, atol=1e-9)


def test_captured_tensors_with_gradients() -> None:
    weight = torch.tensor(1.0, requires_grad=True)
    p = batch()
    y0 = STARTS[:, None].expand(3, 3, 2)
    y = inv.nlp(lambda y, p: weight * objective(y, p), y0, p, eq=sum_is_one, solver=local, n_starts=3)
    (found,) = torch.autograd.grad(y.sum(), weight)
    assert abs(float(found)) < 1e-9  # the minimum does not move
    torch.testing.assert_close(y.detach(), solve(p), rtol=1e-9, atol=1e-9)


@pytest.mark.plugin("invlayer-scipy")
def test_registered_solver() -> None:
    p = batch().requires_grad_()
    y, info = solve(p, "scipy.minimize", return_info=True)
    assert bool(info.ok.all())
    torch.testing.assert_close(y.detach(), torch.from_numpy(best(p.detach().numpy())), rtol=1e-8, atol=1e-8)
    found = torch.autograd.grad(y[:, 0].sum(), p)[0]
    torch.testing.assert_close(found, torch.autograd.grad(solve(p)[:, 0].sum(), p)[0], rtol=1e-7, atol=1e-8)
