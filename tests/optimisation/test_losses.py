"""Robust losses: values against SciPy's, derivatives against closed forms, minima against both."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.losses import Cauchy, GemanMcClure, Huber, Loss, SoftL1, Welsch

pytestmark = pytest.mark.usefixtures("float64")

LOSSES: list[tuple[Loss, Callable[[Tensor], Tensor]]] = [
    (Huber(1.3), lambda u: torch.where(u > 1, 2 * u.sqrt() - 1, u)),
    (SoftL1(1.3), lambda u: 2 * ((1 + u).sqrt() - 1)),
    (Cauchy(1.3), torch.log1p),
    (Welsch(1.3), lambda u: -torch.expm1(-u)),
    (GemanMcClure(1.3), lambda u: u / (1 + u)),
]
NAMES = [type(loss).__name__ for loss, _ in LOSSES]
SMOOTH = pytest.mark.parametrize("loss", [loss for loss, _ in LOSSES], ids=NAMES)


@pytest.mark.parametrize(("loss", "hat"), LOSSES, ids=NAMES)
def test_value_and_derivatives(loss: Loss, hat: Callable[[Tensor], Tensor]) -> None:
    c2 = 1.3**2
    for u in (1e-12, 1e-3, 0.09, 0.11, 0.49, 0.51, 0.9, 1.1, 30.0):
        s = torch.tensor(u * c2)
        ours, theirs = (lambda s: loss(s)), (lambda s: c2 * hat(s / c2))
        for order in range(3):
            torch.testing.assert_close(ours(s), theirs(s), rtol=1e-13, atol=2e-13 * 100**order)
            ours, theirs = grad(ours), grad(theirs)
        torch.testing.assert_close(loss.weight(s), grad(lambda s: c2 * hat(s / c2))(s), rtol=1e-13, atol=0)


@SMOOTH
def test_small_residuals_are_squares_with_every_derivative(loss: Loss) -> None:
    """At r = 0: r̃ = r, with slope 1, no curvature, and the third derivative of the series."""
    zero = torch.zeros(())
    third = {"Huber": 0.0, "SoftL1": -0.25, "Cauchy": -0.5, "Welsch": -0.5, "GemanMcClure": -1.0}
    derivatives = [loss.residual]
    for _ in range(3):
        derivatives.append(grad(derivatives[-1]))
    values = torch.stack([derivative(zero) for derivative in derivatives])
    expected = [0.0, 1.0, 0.0, 3 * third[type(loss).__name__] / 1.3**2]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-14)


@SMOOTH
def test_squares_of_the_robust_residual_are_the_loss(loss: Loss) -> None:
    r = 4 * torch.randn(5, 3, 2)
    torch.testing.assert_close(loss.residual(r).square(), loss(r.square()))
    grouped = type(loss)(1.3, event_dims=2)
    torch.testing.assert_close(
        grouped.residual(r).square().sum((-2, -1)), loss(r.square().sum((-2, -1))), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(jacfwd(grouped.residual)(r), jacrev(grouped.residual)(r))
    assert torch.equal(vmap(grouped.residual)(r), grouped.residual(r))


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize("loss", [Huber(0.7), SoftL1(0.7), Cauchy(0.7)], ids=["huber", "soft_l1", "cauchy"])
def test_minimum_is_that_of_scipy(loss: Loss, request: pytest.FixtureRequest) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    data = outliers(1)[0].numpy()
    theirs = optimize.least_squares(
        lambda y: y[0] * torch.exp(-y[1] * TIMES).numpy() - data,
        [1.0, 0.5], loss=request.node.callspec.id, f_scale=0.7, xtol=1e-15, ftol=1e-15, gtol=1e-15,
    )  # fmt: skip
    ours = fitted(torch.as_tensor(data), loss=loss)
    torch.testing.assert_close(ours, torch.as_tensor(theirs.x), rtol=0, atol=1e-6)


# --- in least_squares -----------------------------------------------------------------------------------

TIMES = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)


def decay(y: Tensor, data: Tensor) -> Tensor:
    return y[..., :1] * torch.exp(-y[..., 1:] * TIMES) - data


def outliers(batch: int = 2) -> Tensor:
    data = torch.exp(-0.7 * TIMES) + 0.05 * torch.randn(batch, 9)
    data[:, 3] += 3.0
    return data


def fitted(data: Tensor, **keywords: Any) -> Any:
    y0 = torch.tensor([1.0, 0.5]).expand(*data.shape[:-1], 2)
    return inv.least_squares(decay, y0, data, **keywords)


def unrolled(data: Tensor, loss: Loss) -> Tensor:
    """The same minimum by recorded Newton steps on ½ Σ ρ(r²), from the solution."""
    y = fitted(data.detach(), loss=loss)
    objective = lambda y, data: 0.5 * loss(decay(y, data).square()).sum(-1)  # noqa: E731
    slope = vmap(grad(objective))
    curvature = vmap(torch.func.hessian(objective))
    for _ in range(4):
        y = y - torch.linalg.solve(curvature(y, data), slope(y, data).unsqueeze(-1)).squeeze(-1)
    return y


@SMOOTH
def test_gradient_is_that_of_unrolled_newton(loss: Loss) -> None:
    data = outliers().requires_grad_()
    y = fitted(data, loss=loss, polish="auto")
    (found,) = torch.autograd.grad(y.sum(), data)
    (expected,) = torch.autograd.grad(unrolled(data, loss).sum(), data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", [Huber(0.2), Welsch(0.5)], ids=["Huber", "Welsch"])
def test_finite_differences(loss: Loss) -> None:
    data = outliers(1).requires_grad_()
    solve = lambda data: fitted(data, loss=loss, polish="auto")  # noqa: E731
    assert torch.autograd.gradcheck(solve, data, atol=1e-7)
    assert torch.autograd.gradgradcheck(solve, data, atol=1e-6)


def test_huber_location_in_closed_form() -> None:
    """The mean of the inliers, moved by c for each outlier: dy/dx = 1/n for inliers, 0 for outliers."""
    data = torch.tensor([[0.1, -0.2, 0.3, 40.0, 50.0, -60.0]], requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    y = inv.least_squares(lambda y, x: y - x, torch.zeros(1, 1), data, loss=Huber(scale), polish="auto")
    torch.testing.assert_close(y, torch.tensor([[(0.2 + 1.5) / 3]]), rtol=0, atol=1e-14)
    by_data, by_scale = torch.autograd.grad(y, (data, scale))
    torch.testing.assert_close(by_data, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]) / 3)
    torch.testing.assert_close(by_scale, torch.tensor(1 / 3))


def test_a_loss_for_each_cost() -> None:
    """Named costs: a group that is robust as a whole, one number by number, and a plain one."""
    data = outliers().requires_grad_()

    def costs(y: Tensor, data: Tensor) -> dict[str, Tensor]:
        r = decay(y, data)
        return {"group": r[..., :4].unflatten(-1, (2, 2)), "each": r[..., 4:8], "plain": r[..., 8]}

    loss = {"group": Cauchy(0.3, event_dims=1), "each": Huber(0.1), "plain": None}

    def objective(y: Tensor, data: Tensor) -> Tensor:
        r = costs(y, data)
        robust = Cauchy(0.3)(r["group"].square().sum(-1)).sum(-1) + Huber(0.1)(r["each"].square()).sum(-1)
        return 0.5 * (robust + r["plain"].square())

    y0 = torch.tensor([1.0, 0.5]).expand(2, 2)
    both = [
        inv.least_squares(costs, y0, data, loss=loss, polish="auto"),
        inv.minimize(objective, y0, data, polish="auto"),
    ]
    torch.testing.assert_close(*both, rtol=0, atol=1e-9)
    gradients = [torch.autograd.grad(y.square().sum(), data)[0] for y in both]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "adjoint", [inv.adjoints.DLM(1e-4, central=True), inv.adjoints.Unrolled(), inv.adjoints.Truncated(30)]
)
def test_every_adjoint(adjoint: Any) -> None:
    data, loss = outliers().requires_grad_(), Welsch(0.5)
    gradients = [
        torch.autograd.grad(fitted(data, loss=loss, **extra).sum(), data)[0]
        for extra in ({}, {"adjoint": adjoint})
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_layers_with_losses_can_be_copied() -> None:
    layer = inv.LeastSquaresLayer(decay, loss=Cauchy(0.3))
    data, y0 = outliers(), torch.tensor([1.0, 0.5]).expand(2, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(data, y0=y0), layer(data, y0=y0))


def test_a_robust_match_of_poses() -> None:
    """The loss applies to each point's distance; an outlier does not move the pose."""
    group = inv.manifolds.SE2()
    points = torch.randn(12, 2)
    truth = group.exp(torch.tensor([[0.5, -0.3, 0.4]]))
    observed = group.act(truth.unsqueeze(-2), points)
    observed[:, 0] += 20.0
    residuals = lambda y, observed: group.act(y.unsqueeze(-2), points) - observed  # noqa: E731
    y = inv.least_squares(residuals, truth.clone(), observed, loss=Welsch(0.2, event_dims=1), manifold=group)
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-10)


# --- what is wrong is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Huber(0.0), r"Huber\(scale=0\.0\): accepted is a number above 0"),
        (lambda: Welsch(-1.0), r"Welsch\(scale=-1\.0\)"),
        (lambda: Cauchy(1.0, event_dims=-1), r"Cauchy\(event_dims=-1\): accepted is an integer >= 0"),
        (
            lambda: fitted(outliers(), loss=Huber),
            r"loss=\.\.\.\) has the class Huber; accepted is an instance",
        ),
        (lambda: fitted(outliers(), loss="huber"), r"has 'huber'; accepted"),
        (lambda: fitted(outliers(), loss={"a": Huber()}), r"residuals 'decay' returned one tensor; accepted"),
        (lambda: fitted(outliers(), loss=Huber(), jacobian=decay), r"least_squares\(jacobian=.*loss="),
    ],
)
def test_wrong_losses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        make()
