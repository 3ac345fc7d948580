"""Least squares by products with J: what is too large to form, and the same minima where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ["torch.gauss_newton", "torch.levenberg_marquardt", "torch.dogleg"]
SOLVERS = pytest.mark.parametrize("solver", NAMES)
BY_PRODUCTS = {"matrix_free": True}


def bent(y: Tensor, data: Tensor) -> Tensor:
    """A curve near the data, smooth in a way that is not linear: residuals remain."""
    rise = y[..., 1:] - y[..., :-1]
    return torch.cat([y - data, 2 * torch.sin(rise), 0.3 * y[..., 1:] * y[..., :-1]], -1)


def smooth(y: Tensor, data: Tensor) -> Tensor:
    """The same with linear residuals, so that the minimum is known: (I + 4 DᵀD) y = data."""
    return torch.cat([y - data, 2 * (y[..., 1:] - y[..., :-1])], -1)


def noisy(batch: int, n: int) -> Tensor:
    return torch.sin(torch.linspace(0, 20, n)) + 0.1 * torch.randn(batch, n)


def fit(f: Any, data: Tensor, solver: str, **keywords: Any) -> tuple[Tensor, inv.SolveInfo]:
    keywords = {"options": BY_PRODUCTS, "return_info": True, **keywords}
    return inv.least_squares(f, torch.zeros_like(data), data, solver=solver, **keywords)


def tridiagonal(rhs: np.ndarray) -> np.ndarray:
    """(I + 4 DᵀD)⁻¹ rhs by Thomas' algorithm."""
    n = len(rhs)
    diagonal = np.full(n, 9.0)
    diagonal[[0, -1]] = 5.0
    above, x = np.empty(n), np.empty(n)
    above[0], x[0] = -4.0 / diagonal[0], rhs[0] / diagonal[0]
    for i in range(1, n):
        pivot = diagonal[i] + 4.0 * above[i - 1]
        above[i], x[i] = -4.0 / pivot, (rhs[i] + 4.0 * x[i - 1]) / pivot
    for i in range(n - 2, -1, -1):
        x[i] -= above[i] * x[i + 1]
    return x


class Largest(TorchDispatchMode):
    """The most entries that a tensor has that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.entries = max(self.entries, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@SOLVERS
def test_5000_unknowns_without_a_matrix(solver: str) -> None:
    """Chosen by size; forward, backward and second derivative make nothing of the order of n²."""
    n = 5000
    data, weights = noisy(1, n).requires_grad_(), torch.randn(n)
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.CG())
    with Largest() as largest:
        y, info = fit(smooth, data, solver, adjoint=adjoint, options={})
        (found,) = torch.autograd.grad(y @ weights, data)
    assert largest.entries <= 10 * n
    assert "matrix-free: steps by conjugate gradients to 0.001" in info.message[0]
    expected = torch.from_numpy(tridiagonal(data.detach().numpy()[0]))
    torch.testing.assert_close(y.detach()[0], expected, rtol=1e-10, atol=1e-11)
    expected = torch.from_numpy(tridiagonal(weights.numpy()))
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)


def test_derivative_where_residuals_remain() -> None:
    """n = 2000: against central differences of the whole solve, and at second order."""
    data, along = noisy(1, 2000).requires_grad_(), torch.randn(1, 2000)
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.CG())

    def loss(data: Tensor) -> Tensor:
        return fit(bent, data, NAMES[1], adjoint=adjoint, options={})[0].pow(3).sum()

    (slope,) = torch.autograd.grad(loss(data), data, create_graph=True)
    (curved,) = torch.autograd.grad((slope * along).sum(), data)
    step = 1e-5
    with torch.no_grad():
        quotient = (loss(data + step * along) - loss(data - step * along)) / (2 * step)
    torch.testing.assert_close((slope.detach() * along).sum(), quotient, rtol=1e-7, atol=0)
    moved = [(data.detach() + sign * step * along).requires_grad_() for sign in (1, -1)]
    slopes = [torch.autograd.grad(loss(point), point)[0] for point in moved]
    torch.testing.assert_close(curved, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@SOLVERS
def test_products_and_matrix_find_the_same(solver: str) -> None:
    data = noisy(3, 40).requires_grad_()
    (by_products, info), (by_matrix, dense) = (
        fit(bent, data, solver, options={"matrix_free": free}) for free in (True, False)
    )
    assert bool(info.ok.all())
    assert "matrix-free" in info.message[0]
    assert "matrix-free" not in dense.message[0]
    torch.testing.assert_close(by_products, by_matrix, rtol=1e-11, atol=1e-12)
    slopes = [torch.autograd.grad(y.sum(), data)[0] for y in (by_products, by_matrix)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("maxiter", [2, 3, 4, 6])
def test_steps_are_the_same_where_some_are_taken_back(maxiter: int) -> None:
    """The model of a sample whose step is taken back is that at the point where it stays."""
    f = lambda y, a: torch.cat([torch.atan(y - a), 0.1 * (y - 1)], -1)  # noqa: E731
    a = torch.tensor([[3.0, -4.0, 5.0], [0.1, 0.2, 0.3], [9.0, 0.0, 0.5]])
    by_products, by_matrix = (
        inv.least_squares(
            f, torch.zeros(3, 3), a, solver=NAMES[0], on_failure="zero_grad",
            options={"matrix_free": free, "inner_rtol": 1e-14, "maxiter": maxiter},
        )
        for free in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(by_products, by_matrix, rtol=1e-9, atol=1e-10)


@SOLVERS
def test_each_sample_goes_as_if_alone(solver: str) -> None:
    """Near, far, where the cost has to be kept from rising, NaN, and one whose start is its end."""
    f = lambda y, a: torch.cat([torch.atan(y - a), 0.01 * (y - 1)], -1)  # noqa: E731
    a = torch.tensor([[0.1, 0.2, 0.3], [3.0, -4.0, 5.0], [9.0, 0.0, 0.0], [torch.nan, 0.0, 0.0], [1.0] * 3])
    start = torch.zeros(5, 3)
    start[4] = 1.0
    run = lambda rows: inv.least_squares(  # noqa: E731
        f, start[rows], a[rows], solver=solver, options=BY_PRODUCTS, on_failure="zero_grad", return_info=True
    )
    together, info = run(slice(None))
    assert info.ok.tolist() == [True, True, True, False, True]
    for i in range(5):
        alone, of_one = run(slice(i, i + 1))
        assert torch.equal(together[i].nan_to_num(9.0), alone[0].nan_to_num(9.0))
        assert int(info.iterations[i]) == int(of_one.iterations[0])


@SOLVERS
def test_jacobian_of_the_user_serves_the_products(solver: str) -> None:
    data, calls = noisy(2, 6), []

    def jacobian(y: Tensor, data: Tensor) -> Tensor:
        calls.append(1)
        return torch.func.vmap(torch.func.jacrev(bent), in_dims=(0, 0))(y, data)

    theirs = fit(bent, data, solver, jacobian=jacobian)[0]
    assert calls
    torch.testing.assert_close(theirs, fit(bent, data, solver)[0], rtol=1e-10, atol=1e-11)


@SOLVERS
def test_rank_deficient_residuals(solver: str) -> None:
    """Only the sum is determined: the step of least norm changes all unknowns alike."""
    f = lambda y, b: torch.cat([y.sum(-1, keepdim=True) - b, 0 * y], -1)  # noqa: E731
    y = inv.least_squares(f, torch.zeros(1, 4), torch.tensor([[3.0]]), solver=solver, options=BY_PRODUCTS)
    torch.testing.assert_close(y, torch.full((1, 4), 0.75), rtol=1e-9, atol=0)


@SOLVERS
def test_residuals_that_read_no_unknown(solver: str) -> None:
    f = lambda y, b: b.expand_as(y) + 1  # noqa: E731
    y, info = fit(f, torch.ones(2, 3), solver)
    assert torch.equal(y, torch.zeros(2, 3))
    assert bool(info.ok.all())


@pytest.mark.parametrize("mapped", [False, True])
def test_under_vmap(mapped: bool) -> None:
    data = noisy(4, 10)
    solve = lambda d: inv.least_squares(bent, torch.zeros(10), d, solver=NAMES[0], options=BY_PRODUCTS)  # noqa: E731
    slope = torch.func.grad(lambda d: solve(d).sum())
    found = torch.vmap(slope)(data) if mapped else torch.stack([slope(row) for row in data])
    leaf = data.clone().requires_grad_()
    y = inv.least_squares(bent, torch.zeros(4, 10), leaf, solver=NAMES[0])
    torch.testing.assert_close(found, torch.autograd.grad(y.sum(), leaf)[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("adjoint", [inv.adjoints.Unrolled(), inv.adjoints.Truncated(2)])
def test_what_is_recorded_forms_its_matrix(adjoint: Any) -> None:
    """By itself up to 1 GiB; asked for products, it says what to do."""
    data = noisy(1, 1001).requires_grad_()
    y, info = fit(smooth, data, NAMES[0], adjoint=adjoint, options={"maxiter": 3})
    assert ("matrix-free" in info.message[0]) == isinstance(adjoint, inv.adjoints.Truncated)
    (found,) = torch.autograd.grad(y[0, 0], data)
    unit = np.zeros(1001)
    unit[0] = 1.0
    torch.testing.assert_close(found[0], torch.from_numpy(tridiagonal(unit)), rtol=1e-9, atol=1e-9)
    with pytest.raises(inv.ConditionsError, match=r"takes its steps by products.*Accepted"):
        fit(smooth, noisy(1, 3).requires_grad_(), NAMES[0], adjoint=adjoint)


def test_inner_iterations_are_bounded() -> None:
    """One product a step is steepest descent: it fails within its iterations, and the message says how."""
    options = {"matrix_free": True, "inner_maxiter": 1, "maxiter": 3}
    with pytest.raises(inv.ConvergenceError, match=r"NOT_CONVERGED.*maxiter=3; matrix-free"):
        fit(bent, noisy(1, 30), NAMES[0], options=options)


def test_float32() -> None:
    data = noisy(2, 30)
    y, info = fit(bent, data.float(), NAMES[1])
    assert y.dtype == torch.float32
    assert bool(info.ok.all())
    torch.testing.assert_close(y.double(), fit(bent, data, NAMES[1])[0], rtol=1e-3, atol=1e-3)
