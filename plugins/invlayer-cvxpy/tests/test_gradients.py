"""Gradients of every parameter of ten problem families, against finite differences of polished solves.

Polished solutions hold to 1e-15, so that central differences of fourth order are good to about 1e-10.
"""

from collections.abc import Callable
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from invlayer_cvxpy import CvxpyLayer


class Family(NamedTuple):
    problem: cp.Problem
    parameters: list[cp.Parameter]
    variables: list[cp.Variable]
    values: list[np.ndarray]  # the first of each is a batch of two
    gp: bool = False


def qp(draw: Callable[..., np.ndarray]) -> Family:
    x, Q, q = cp.Variable(4), cp.Parameter((4, 4), PSD=True), cp.Parameter(4)
    G, h, A, b = cp.Parameter((3, 4)), cp.Parameter(3), cp.Parameter((1, 4)), cp.Parameter(1)
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, Q) + q @ x), [G @ x <= h, A @ x == b])
    root = draw(2, 4, 4)
    square = root @ root.transpose(0, 2, 1) + np.eye(4)
    values = [square, draw(2, 4), draw(3, 4), 0.1 * np.ones(3), np.ones((1, 4)), np.ones(1)]
    return Family(problem, [Q, q, G, h, A, b], [x], values)


def regularised_lp(draw: Callable[..., np.ndarray]) -> Family:
    x, c, G, h = cp.Variable(4), cp.Parameter(4), cp.Parameter((5, 4)), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(c @ x + 0.05 * cp.sum_squares(x)), [G @ x <= h])
    return Family(problem, [c, G, h], [x], [draw(2, 4), draw(2, 5, 4), np.ones(5)])


def socp(draw: Callable[..., np.ndarray]) -> Family:
    x, c = cp.Variable(4), cp.Parameter(4)
    A, b = [cp.Parameter((3, 4)) for _ in range(2)], [cp.Parameter(3) for _ in range(2)]
    cones = [cp.norm(A[i] @ x + b[i]) <= 1 + 0.1 * x[0] for i in range(2)]
    problem = cp.Problem(cp.Minimize(c @ x + 0.1 * cp.sum_squares(x)), cones)
    values = [draw(3, 4), draw(2, 3, 4), 0.1 * draw(2, 3), 0.1 * draw(3), 3 * draw(2, 4)]
    return Family(problem, [*A, *b, c], [x], values)


def sdp(draw: Callable[..., np.ndarray]) -> Family:
    X, C = cp.Variable((6, 6), symmetric=True), cp.Parameter((6, 6), symmetric=True)
    A, b = cp.Parameter((6, 6)), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X >> 0, cp.trace(X) == 1, cp.trace(A @ X) >= b])
    half = draw(2, 6, 6)
    return Family(problem, [C, A, b], [X], [half + half.transpose(0, 2, 1), draw(6, 6), np.array(0.8)])


def entropy(draw: Callable[..., np.ndarray]) -> Family:
    x, F, g, a = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(2), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(-cp.sum(cp.entr(x)) + a @ x), [F @ x == g, cp.sum(x) == 1])
    matrix = draw(2, 4)
    return Family(problem, [F, g, a], [x], [matrix, matrix @ np.array([0.1, 0.2, 0.3, 0.4]), draw(2, 4)])


def portfolio(draw: Callable[..., np.ndarray]) -> Family:
    x, mu, S, width = cp.Variable(4), cp.Parameter(4), cp.Parameter((4, 4)), cp.Parameter(nonneg=True)
    constraints = [cp.sum(x) == 1, x >= 0, cp.norm1(x - 0.2) <= width]
    problem = cp.Problem(cp.Maximize(mu @ x - cp.sum_squares(S @ x)), constraints)
    return Family(problem, [mu, S, width], [x], [0.1 * draw(2, 4), draw(2, 4, 4), np.array(0.7)])


def logistic_regression(draw: Callable[..., np.ndarray]) -> Family:
    w, X, lam, y = cp.Variable(2), cp.Parameter((8, 2)), cp.Parameter(nonneg=True), np.sign(draw(8))
    loss = cp.sum(cp.logistic(cp.multiply(-y, X @ w))) / 8
    problem = cp.Problem(cp.Minimize(loss + lam * cp.sum_squares(w)))
    return Family(problem, [X, lam], [w], [draw(2, 8, 2), np.array(0.1)])


def nonnegative_least_squares(draw: Callable[..., np.ndarray]) -> Family:
    x, A, b = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0])
    return Family(problem, [A, b], [x], [draw(2, 6, 4), draw(2, 6)])


def power_cone(draw: Callable[..., np.ndarray]) -> Family:
    x, a, r = cp.Variable(3), cp.Parameter(2), cp.Parameter(pos=True)
    constraints = [cp.PowCone3D(x[0], x[1], x[2], 0.4), cp.sum_squares(x) <= r]
    problem = cp.Problem(cp.Maximize(x[2] - a @ x[:2]), constraints)
    return Family(problem, [a, r], [x], [draw(2, 2), np.array(1.3)])


def geometric(draw: Callable[..., np.ndarray]) -> Family:
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
    problem = cp.Problem(cp.Minimize(1 / (x * y * z)), constraints)
    values = [np.array([2.0, 1.0]), np.array(1.0), np.array(0.5)]
    return Family(problem, [a, b, c], [x, y, z], values, gp=True)


FAMILIES = [
    qp, regularised_lp, socp, sdp, entropy, portfolio, logistic_regression, nonnegative_least_squares,
    power_cone, geometric,
]  # fmt: skip


def drawing() -> Callable[..., np.ndarray]:
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape)


def fourth_order(f: Callable[[float], Tensor], step: float = 1e-4) -> float:
    return float((8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step))


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_gradients_of_all_parameters(make: Callable[..., Family], solver: str) -> None:
    family = make(drawing())
    layer = CvxpyLayer(
        family.problem, family.parameters, family.variables, gp=family.gp, solver=solver, return_info=True
    )
    values = [torch.tensor(value).requires_grad_() for value in family.values]
    found, info = layer(*values)
    assert info.residual.max() < 1e-13
    weights = [torch.randn(each.shape) for each in found]

    def loss(values: list[Tensor]) -> Tensor:
        return sum((w * y).sum() for w, y in zip(weights, layer(*values)[0], strict=True))

    gradients = torch.autograd.grad(loss(values), values)
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        direction = torch.randn(value.shape)
        if family.parameters[i].attributes["symmetric"] or family.parameters[i].attributes["PSD"]:
            direction = direction + direction.mT

        def moved(t: float, i: int = i, direction: Tensor = direction) -> Tensor:
            with torch.no_grad():
                return loss([v + t * direction if j == i else v for j, v in enumerate(values)])

        expected = fourth_order(moved)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("make", [qp, socp], ids=lambda make: make.__name__)
def test_gradcheck_and_gradgradcheck(make: Callable[..., Family]) -> None:
    family = make(drawing())
    layer = CvxpyLayer(family.problem, family.parameters, family.variables)
    values = [torch.tensor(value).requires_grad_() for value in family.values]
    assert gradcheck(layer, values, atol=1e-7, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(layer, values, atol=1e-6, fast_mode=True)


def test_full_gradcheck_of_a_small_qp() -> None:
    x, c, G = cp.Variable(2), cp.Parameter(2), cp.Parameter((1, 2))
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [G @ x <= 1]), [c, G], [x])
    values = [torch.randn(2, 2).requires_grad_(), (1 + torch.rand(1, 2)).requires_grad_()]
    assert gradcheck(layer, values, atol=1e-7, check_forward_ad=True)
    assert gradgradcheck(layer, values, atol=1e-6)


def test_equality_constrained_qp_against_its_closed_form() -> None:
    """[Q Aᵀ; A 0] (x, y) = (−q, b), differentiated by torch itself, to second order."""
    x, q, A, b = cp.Variable(4), cp.Parameter(4), cp.Parameter((2, 4)), cp.Parameter(2)
    equality = A @ x == b
    layer = CvxpyLayer(
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + q @ x), [equality]), [q, A, b], [x, equality]
    )
    values = [torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)]
    values = [value.requires_grad_() for value in values]
    q_, A_, b_ = values
    top = torch.cat([torch.eye(4), A_.mT], -1)
    kkt = torch.cat([top, torch.cat([A_, torch.zeros(2, 2)], -1)], -2)
    exact = torch.linalg.solve(kkt, torch.cat([-q_, b_], -1).mT).mT
    found = torch.cat(layer(*values), -1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    first = [torch.autograd.grad(y.sin().sum(), values, create_graph=True) for y in (found, exact)]
    for ours, theirs in zip(*first, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    second = [torch.autograd.grad(sum(g.cos().sum() for g in grads), values) for grads in first]
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [socp, sdp, entropy], ids=lambda make: make.__name__)
def test_torch_func(make: Callable[..., Family]) -> None:
    family = make(drawing())
    layer = CvxpyLayer(family.problem, family.parameters, family.variables)
    *fixed, last = (torch.tensor(value) for value in family.values)
    fixed = [v[0] if v.ndim > len(p.shape) else v for v, p in zip(fixed, family.parameters, strict=False)]
    rows = last if last.ndim > len(family.parameters[-1].shape) else torch.stack([last, 1.1 * last])
    solve = lambda value: layer(*fixed, value)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(solve)(rows), solve(rows), rtol=0, atol=1e-12)
    by_rows = torch.func.vmap(torch.func.jacrev(solve))(rows)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(solve))(rows), by_rows, rtol=0, atol=1e-10)
    plain = torch.stack([torch.autograd.functional.jacobian(solve, row) for row in rows])
    torch.testing.assert_close(by_rows, plain, rtol=0, atol=1e-10)
    hessian = torch.func.jacfwd(torch.func.jacrev(lambda value: solve(value).sin().sum()))(rows[0])
    exact = torch.autograd.functional.hessian(lambda value: solve(value).sin().sum(), rows[0])
    torch.testing.assert_close(hessian, exact, rtol=1e-9, atol=1e-8)
