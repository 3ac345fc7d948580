"""Robust losses and weights: their values, their derivatives, and fits that an outlier does not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import invlayer_core as inv
from invlayer_core.adjoints import DLM, Implicit
from invlayer_core.costs import huber, weighted, welsch

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = pytest.mark.parametrize("loss", [huber, welsch])


def rho(loss: Callable[..., Tensor], squares: Tensor, size: float) -> Tensor:
    """The textbook formulas."""
    if loss is huber:
        return torch.where(squares <= size**2, squares, 2 * size * squares.sqrt() - size**2)
    return -(size**2) * torch.expm1(-squares / size**2)


@LOSSES
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("size", [0.3, 1.0, 20.0])
def test_half_square_is_the_loss(loss: Any, joint: bool, size: float) -> None:
    r = torch.randn(50, 3) * torch.logspace(-3, 3, 50).unsqueeze(-1)
    squares = r.square().sum(-1) if joint else r.square()
    found = loss(r, size, joint=joint).square()
    found = found.sum(-1) if joint else found
    torch.testing.assert_close(found, rho(loss, squares, size), rtol=1e-10, atol=1e-16)


@LOSSES
@pytest.mark.parametrize("joint", [False, True])
def test_derivatives(loss: Any, joint: bool) -> None:
    """Also at zero, where ρ(s)/s is 0/0, by the residuals and by the size."""
    r = torch.tensor([[0.0, 0.0], [0.01, 0.02], [0.4, -0.2], [3.0, -2.0]], requires_grad=True)
    size = torch.tensor(0.7, requires_grad=True)
    run = lambda r, size: loss(r, size, joint=joint)  # noqa: E731
    assert gradcheck(run, (r, size))
    assert gradgradcheck(run, (r, size))


def test_series_of_welsch_joins_its_formula() -> None:
    """On both sides of where the one gives way to the other."""
    r = torch.tensor([1e-3**0.5 * (1 - 1e-9), 1e-3**0.5 * (1 + 1e-9)], requires_grad=True)
    (slope,) = torch.autograd.grad(welsch(r, 1.0).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert abs(float((slope[0] - slope[1]).detach())) < 1e-10
    assert abs(float(curvature[0] - curvature[1])) < 1e-8


def test_weights() -> None:
    r = torch.randn(4, 3)
    matrix = torch.randn(3, 3)
    torch.testing.assert_close(weighted(r, 2.0), 2 * r)
    torch.testing.assert_close(weighted(r, torch.arange(3.0)), r * torch.arange(3.0))
    torch.testing.assert_close(weighted(r, matrix, matrix=True), r @ matrix.T)
    torch.testing.assert_close(weighted(r, matrix.expand(4, 3, 3), matrix=True), r @ matrix.T)
    torch.testing.assert_close(weighted(r[:3], matrix), r[:3] * matrix)  # never by its shape


# --- in a layer -----------------------------------------------------------------------------------------

x = torch.linspace(0, 1, 20, dtype=torch.float64)


def spoiled() -> Tensor:
    """A line with noise, and two outliers in each of two batches."""
    data = 2 * x + 1 + 0.01 * torch.randn(2, 20)
    data[0, 3], data[0, 15], data[1, 8], data[1, 9] = 30.0, -20.0, 10.0, 12.0
    return data.requires_grad_()


def line(p: Tensor, data: Tensor) -> Tensor:
    return p[..., :1] * x + p[..., 1:] - data


@LOSSES
@pytest.mark.parametrize("solver", ["torch.levenberg_marquardt", "torch.lbfgs"])
def test_outliers_do_not_count(loss: Any, solver: str) -> None:
    """Nor does the fit depend on them: far beyond the radius, the derivative by the data is zero."""
    data, start = spoiled(), torch.tensor([[1.5, 1.2]]).expand(2, 2).clone()
    fit = lambda f: inv.least_squares(f, start, data, solver=solver, polish="auto")  # noqa: E731
    p = fit(lambda p, data: loss(line(p, data), 0.5))
    tolerance = 0.2 if loss is huber else 0.02
    assert float((p.detach() - torch.tensor([2.0, 1.0])).abs().max()) < tolerance
    assert float((fit(line).detach() - torch.tensor([2.0, 1.0])).abs().max()) > 0.5
    (gradient,) = torch.autograd.grad(p[:, 0].sum(), data)
    outliers = gradient[[0, 0, 1, 1], [3, 15, 8, 9]]
    assert float(outliers.abs().max()) < 1e-12
    assert float(gradient.abs().max()) > 1e-2


@LOSSES
def test_gradients_by_weights_and_size(loss: Any) -> None:
    """Against central differences of the re-solved layer, and against DLM."""
    data, start = spoiled().detach(), torch.tensor([[1.5, 1.2]]).expand(2, 2).clone()

    def layer(weight: Tensor, size: Tensor, adjoint: Any = Implicit()) -> Tensor:  # noqa: B008
        f = lambda p, weight, size: loss(weighted(line(p, data), weight), size)  # noqa: E731
        y: Tensor = inv.least_squares(f, start, (weight, size), adjoint=adjoint, polish="auto")
        return y

    args = [torch.rand(20).add(0.5).requires_grad_(), torch.tensor(0.6, requires_grad=True)]
    assert gradcheck(layer, args, atol=1e-6)
    exact = torch.autograd.grad(layer(*args).sum(), args)
    ours = torch.autograd.grad(layer(*args, DLM(1e-4, central=True)).sum(), args)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_costs_of_several_kinds_in_one_problem() -> None:
    """Named residuals, each with its weight and its loss: points seen, and a prior."""
    seen = torch.randn(3, 5, 2, requires_grad=True)
    prior_weight = torch.tensor([0.5, 2.0], requires_grad=True)

    def residuals(y: dict[str, Tensor], seen: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {
            "points": huber(seen - y["centre"].unsqueeze(-2), 1.0, joint=True),
            "prior": weighted(y["centre"], w),
        }

    y0 = {"centre": torch.zeros(3, 2)}
    _, info = inv.least_squares(residuals, y0, (seen, prior_weight), return_info=True)
    assert bool(info.ok.all())
    assert gradcheck(
        lambda seen, w: inv.least_squares(residuals, y0, (seen, w), polish="auto")["centre"],
        (seen, prior_weight),
        atol=1e-6,
    )


@pytest.mark.parametrize("loss", [huber, welsch])
@pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
def test_size_is_checked(loss: Any, size: float) -> None:
    with pytest.raises(inv.ConditionsError, match=rf"{loss.__name__}\((radius|scale)=.*accepted is a number"):
        loss(torch.zeros(2), size)
