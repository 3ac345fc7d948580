"""Minimisation and least squares: the derivative of an opaque minimiser, with the full Hessian."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

A = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.5, -0.3], [0.1, -0.3, 1.0]], dtype=torch.float64)


def objective(y: Tensor, a: Tensor) -> Tensor:
    """Convex, with a third derivative: Σ exp(y) − aᵀy + ½ yᵀAy."""
    return y.exp().sum(-1) - (a * y).sum(-1) + 0.5 * ((y @ A) * y).sum(-1)


@inv.from_numpy
def newton(y0: np.ndarray, a: np.ndarray) -> np.ndarray:
    """An opaque minimiser of the objective, in NumPy."""
    matrix = A.numpy()
    rows = []
    for row in np.broadcast_to(a, np.broadcast_shapes(a.shape, y0.shape)).reshape(-1, 3):
        y = np.zeros(3)
        for _ in range(50):
            y = y - np.linalg.solve(np.diag(np.exp(y)) + matrix, np.exp(y) - row + matrix @ y)
        rows.append(y)
    return np.array(rows).reshape(y0.shape)


def solve(a: Tensor, **keywords: Any) -> Any:
    return inv.minimize(objective, torch.zeros_like(a), a, **({"solver": newton} | keywords))


def unrolled(a: Tensor) -> Tensor:
    """The same minimum by recorded Newton steps."""
    y = torch.zeros_like(a)
    for _ in range(12):
        slope = y.exp() - a + y @ A
        y = y - torch.linalg.solve(torch.diag_embed(y.exp()) + A, slope)
    return y


def data(batch: int | None = 4) -> Tensor:
    shape = (3,) if batch is None else (batch, 3)
    return 1.0 + torch.rand(shape)


@pytest.mark.parametrize("batch", [None, 1, 3, 4])
def test_gradient_is_that_of_unrolled_newton(batch: int | None) -> None:
    a, cotangent = data(batch).requires_grad_(), torch.randn(data(batch).shape)
    (found,) = torch.autograd.grad(solve(a), a, cotangent)
    (expected,) = torch.autograd.grad(unrolled(a), a, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_second_order() -> None:
    a = data(2).requires_grad_()
    assert torch.autograd.gradcheck(solve, a)
    assert torch.autograd.gradgradcheck(solve, a)
    found = hessian(lambda a: solve(a).square().sum())(a.detach())
    expected = hessian(lambda a: unrolled(a).square().sum())(a.detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_transforms(transform: Any) -> None:
    a = data()
    expected = jacrev(unrolled)(a)
    torch.testing.assert_close(transform(solve)(a), expected, rtol=1e-9, atol=1e-10)
    each = torch.stack([expected[i, :, i] for i in range(4)])
    torch.testing.assert_close(vmap(transform(solve))(a), each, rtol=1e-9, atol=1e-10)


def test_user_hessian_is_used() -> None:
    calls = []

    def given(y: Tensor, a: Tensor) -> Tensor:
        calls.append(y.shape)
        return torch.diag_embed(y.exp()) + A

    a = data().requires_grad_()
    (found,) = torch.autograd.grad(solve(a, hessian=given).sum(), a)
    (expected,) = torch.autograd.grad(unrolled(a).sum(), a)
    assert calls
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_wrong_user_hessian_is_caught() -> None:
    a = data().requires_grad_()
    y = solve(a, hessian=lambda y, a: 2 * torch.diag_embed(y.exp()) + A)
    with pytest.raises(inv.ConditionsError, match="is not the Jacobian of the conditions"):
        y.sum().backward()


class Energy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(A.clone())

    def forward(self, y: Tensor, a: Tensor) -> Tensor:
        return y.exp().sum(-1) - (a * y).sum(-1) + 0.5 * ((y @ self.weight) * y).sum(-1)


def unrolled_of_weight(weight: Tensor, a: Tensor) -> Tensor:
    symmetric, y = (weight + weight.mT) / 2, torch.zeros_like(a)
    for _ in range(12):
        y = y - torch.linalg.solve(torch.diag_embed(y.exp()) + symmetric, y.exp() - a + y @ symmetric)
    return y


def test_parameters_of_the_objective() -> None:
    layer = inv.MinimizeLayer(Energy(), solver=newton)
    a = data()
    layer(a, y0=torch.zeros_like(a)).sum().backward()
    weight = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(unrolled_of_weight(weight, a).sum(), weight)
    torch.testing.assert_close(layer.objective.weight.grad, expected, rtol=1e-10, atol=1e-12)
    swapped = {"objective.weight": A.clone().requires_grad_()}
    y = functional_call(layer, swapped, (a,), {"y0": torch.zeros_like(a)})
    (found,) = torch.autograd.grad(y.sum(), swapped["objective.weight"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_layers_can_be_copied_and_pickled() -> None:
    layer = inv.MinimizeLayer(Energy(), solver="torch.lbfgs", atol=1e-5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.objective.weight, layer.objective.weight)


def test_named_unknowns() -> None:
    a = data().requires_grad_()

    def split(y: dict[str, Tensor], a: Tensor) -> Tensor:
        return objective(torch.cat([y["first"].unsqueeze(-1), y["rest"]], -1), a)

    def solver(y0: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
        y = newton(torch.zeros_like(a), a)
        return {"first": y[..., 0], "rest": y[..., 1:]}

    y0 = {"first": torch.zeros(4), "rest": torch.zeros(4, 2)}
    y = inv.minimize(split, y0, a, solver=solver, event_dims={"first": 0, "rest": 1})
    assert [y[name].shape for name in ("first", "rest")] == [(4,), (4, 2)]
    (found,) = torch.autograd.grad(y["first"].sum() + y["rest"].sum(), a)
    (expected,) = torch.autograd.grad(unrolled(a).sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_failed_sample_stays_alone() -> None:
    a = data().requires_grad_()

    @inv.from_numpy
    def failing(y0: np.ndarray, a: np.ndarray) -> np.ndarray:
        y = newton.function(y0, a)
        y[1] = 5.0
        return y

    y, info = solve(a, solver=failing, on_failure="nan", return_info=True)
    assert info.ok.tolist() == [True, False, True, True]
    clean = solve(a)
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])
    (found,) = torch.autograd.grad(y[[0, 2, 3]].sum(), a)
    (expected,) = torch.autograd.grad(clean[[0, 2, 3]].sum(), a)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (lambda y, a: objective(y, a).sum(), r"shape \(\)"),
        (lambda y, a: y, r"shape \(4, 3\)"),
        (lambda y, a: 3.0, "float"),
        (lambda y, a: objective(y, a).unsqueeze(-1), r"shape \(4, 1\)"),
    ],
)
def test_objective_of_another_shape(wrong: Any, came: str) -> None:
    a = data()
    with pytest.raises(
        inv.ConditionsError, match=rf"objective .* returned {came}.*accepted is one real number"
    ):
        inv.minimize(wrong, torch.zeros_like(a), a, solver=newton)


def test_flat_minimum_is_named() -> None:
    a = torch.zeros(1, requires_grad=True)
    y = inv.minimize(lambda y, a: (y - a).pow(4).sum(-1), torch.zeros(1), a, solver=lambda y0, a: a.clone())
    with pytest.raises(inv.SingularJacobianError, match="singular at the solution"):
        y.backward()


# --- least squares --------------------------------------------------------------------------------------

TIMES = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)


def residuals(y: Tensor, data: Tensor) -> Tensor:
    """A decay beside data that it does not fit: with residuals left, Gauss–Newton derivatives are wrong."""
    return y[..., :1] * torch.exp(-y[..., 1:] * TIMES) - data


@inv.from_numpy
def fit(y0: np.ndarray, data: np.ndarray) -> np.ndarray:
    rows, times = [], TIMES.numpy()
    for row in data.reshape(-1, 9):
        y = np.array([1.0, 0.5])
        for _ in range(60):
            decay = np.exp(-y[1] * times)
            r = y[0] * decay - row
            J = np.stack([decay, -y[0] * times * decay], -1)
            curvature = np.array(
                [
                    [0.0, (r * -times * decay).sum()],
                    [(r * -times * decay).sum(), (r * y[0] * times**2 * decay).sum()],
                ]
            )
            y = y - np.linalg.solve(J.T @ J + curvature, J.T @ r)
        rows.append(y)
    return np.array(rows).reshape(y0.shape)


def noisy(batch: int = 3) -> Tensor:
    return torch.exp(-0.7 * TIMES) + 0.3 * torch.randn(batch, 9)


def fitted(data: Tensor, **keywords: Any) -> Any:
    y0 = torch.tensor([1.0, 0.5]).expand(*data.shape[:-1], 2)
    return inv.least_squares(residuals, y0, data, **({"solver": fit} | keywords))


def test_full_hessian_and_not_gauss_newton() -> None:
    data = noisy().requires_grad_()
    y = fitted(data)
    assert torch.autograd.gradcheck(fitted, data)
    (found,) = torch.autograd.grad(y[:, 1].sum(), data)
    J = jacrev(residuals)(y.detach()[0], data.detach()[0])
    gauss_newton = torch.linalg.solve(J.mT @ J, J.mT)[1]
    difference = (found[0] - gauss_newton).norm() / found[0].norm()
    assert difference > 0.02


def test_residuals_of_any_structure() -> None:
    """Named costs, of shapes of their own: the same problem, the same derivative."""
    data = noisy().requires_grad_()

    def named(y: Tensor, data: Tensor) -> dict[str, Tensor]:
        r = residuals(y, data)
        return {"early": r[..., :4].unflatten(-1, (2, 2)), "late": r[..., 4:]}

    y0 = torch.tensor([1.0, 0.5]).expand(3, 2)
    y = inv.least_squares(named, y0, data, solver=fit)
    (found,) = torch.autograd.grad(y.sum(), data)
    (expected,) = torch.autograd.grad(fitted(data).sum(), data)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_residuals_without_event_dims_are_refused() -> None:
    data = noisy()
    with pytest.raises(inv.ConditionsError, match="accepted"):
        inv.least_squares(lambda y, data: residuals(y, data).sum(), torch.ones(3, 2), data, solver=fit)


def test_adjoint_per_call() -> None:
    layer = inv.LeastSquaresLayer(residuals, solver=fit, adjoint=inv.adjoints.Implicit(singular="nan"))
    data = noisy().requires_grad_()
    y0 = torch.tensor([1.0, 0.5]).expand(3, 2)
    first = layer(data, y0=y0)
    second, info = layer(data, y0=y0, adjoint=inv.adjoints.Implicit(), return_info=True)
    assert bool(info.ok.all())
    assert torch.equal(*(torch.autograd.grad(y.sum(), data)[0] for y in (first, second)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    data = noisy().to(dtype).requires_grad_()
    y0 = torch.tensor([1.0, 0.5], dtype=dtype).expand(3, 2)
    y = inv.least_squares(
        lambda y, data: y[..., :1] * torch.exp(-y[..., 1:] * TIMES.to(data)) - data,
        y0,
        data,
        solver=fit,
        atol=1e-2,
    )
    assert y.dtype == dtype
    (found,) = torch.autograd.grad(y.sum(), data)
    assert found.dtype == dtype
    double = data.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(fitted(double).sum(), double)
    torch.testing.assert_close(found.double(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind", ["minimize", "least_squares", "nlp"])
def test_check_layer_knows_the_layers(kind: str) -> None:
    layers = {
        "minimize": (inv.MinimizeLayer(objective, solver=newton), data(2), torch.zeros(2, 3)),
        "least_squares": (inv.LeastSquaresLayer(residuals, solver=fit), noisy(2), torch.ones(2, 2)),
        "nlp": (
            inv.NLPLayer(objective, bounds=(-5.0, None), solver=newton, polish=0),
            data(2),
            torch.zeros(2, 3),
        ),
    }
    layer, a, y0 = layers[kind]
    report = inv.check_layer(layer, a, y0=y0)
    assert report.inputs == ("args[0]",)
    assert report.ok, str(report)


# --- Jacobians by hand ----------------------------------------------------------------------------------


def by_hand(y: Tensor, data: Tensor) -> Tensor:
    decay = torch.exp(-y[..., 1:] * TIMES)
    return torch.stack([decay, -y[..., :1] * TIMES * decay], -1)


def test_jacobian_by_hand_is_checked_on_request() -> None:
    y, data = torch.tensor([[1.0, 0.5], [2.0, 0.1]]), noisy(2)
    assert inv.check_jacobian(residuals, by_hand, y, data) < 1e-14
    named = lambda y, data: residuals(torch.cat([y["a"], y["b"]], -1), data)  # noqa: E731
    of_named = lambda y, data: by_hand(torch.cat([y["a"], y["b"]], -1), data)  # noqa: E731
    assert inv.check_jacobian(named, of_named, {"a": y[:, :1], "b": y[:, 1:]}, data) < 1e-14


def wrong_by_hand(y: Tensor, data: Tensor) -> Tensor:
    return by_hand(y, data) * torch.tensor([1.0, -1.0])


def test_wrong_jacobian_by_hand_is_named() -> None:
    y, data = torch.tensor([[1.0, 0.5], [2.0, 0.1]]), noisy(2)
    where = r"of residual 8 by unknown 1 in sample 1 it says 3\.27\d+, autograd -3\.27\d+"
    with pytest.raises(inv.ConditionsError, match=rf"'wrong_by_hand' is not the derivative of .*{where}"):
        inv.check_jacobian(residuals, wrong_by_hand, y, data)
    with pytest.raises(inv.ConditionsError, match=r"returned shape \(2, 2, 9\); accepted .* \(2, 9, 2\)"):
        inv.check_jacobian(residuals, lambda y, data: by_hand(y, data).mT, y, data)


@pytest.mark.parametrize(("jacobian", "verdict"), [(by_hand, "ok"), (wrong_by_hand, "wrong")])
def test_check_layer_has_a_row_for_it(jacobian: Any, verdict: str) -> None:
    layer = inv.LeastSquaresLayer(residuals, jacobian=jacobian, solver=fit)
    data = torch.exp(-0.7 * TIMES) + 0.05 * torch.randn(2, 9)
    report = inv.check_layer(layer, data, y0=torch.tensor([1.0, 0.5]).expand(2, 2))
    row = report.row("given Jacobian")
    assert row.verdict == verdict
    assert report.ok == (verdict == "ok")
    assert ("by unknown 1" in row.detail) == (verdict == "wrong")


def test_info_has_the_objective_of_each_sample() -> None:
    a = data()
    y, info = solve(a, return_info=True)
    torch.testing.assert_close(info.objective, objective(y, a), rtol=0, atol=0)
    measured = noisy()
    y, info = fitted(measured, return_info=True)
    torch.testing.assert_close(info.objective, 0.5 * residuals(y, measured).square().sum(-1), rtol=0, atol=0)
