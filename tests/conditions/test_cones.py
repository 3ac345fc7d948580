"""Projections onto dual cones: what they must satisfy, and their derivatives of every order."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import invlayer_core as inv

F64 = torch.float64

PRODUCTS = {
    "zero and nonneg": inv.Cones(zero=2, nonneg=3),
    "soc": inv.Cones(soc=(1, 2, 4, 4)),
    "psd": inv.Cones(psd=(1, 3, 3)),
    "exp": inv.Cones(exp=4),
    "power": inv.Cones(power=(0.1, 0.5, 0.9)),
    "all, sizes out of order": inv.Cones(zero=1, nonneg=1, soc=(3, 2, 3), psd=(2, 1, 2), exp=1, power=(0.3,)),
}


@pytest.fixture(params=PRODUCTS)
def cones(request: pytest.FixtureRequest) -> inv.Cones:
    return PRODUCTS[request.param]


def points(cones: inv.Cones, count: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, cones.size, generator=generator, dtype=F64)


def is_in_exp(point: list[float], slack: float) -> bool:
    x, y, z = point
    return z >= -slack and y >= -slack and (y <= slack or y * math.exp(x / y) <= z + slack)


def is_in_power(point: list[float], alpha: float, slack: float) -> bool:
    x, y, z = point
    return x >= -slack and y >= -slack and max(x, 0) ** alpha * max(y, 0) ** (1 - alpha) >= abs(z) - slack


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_y_and_s_are_in_their_cones_and_orthogonal(cones: inv.Cones, scale: float) -> None:
    """Moreau: v = y − s with y ∈ K*, s ∈ K, yᵀs = 0 determines y. Membership: y is its own projection."""
    v = points(cones, 300, scale)
    y = cones.project_dual(v)
    s = y - v
    tolerance = 1e-13 * scale * v.shape[-1]
    assert (y * s).sum(-1).abs().max() < tolerance * scale
    assert (cones.project_dual(y) - y).abs().max() < tolerance
    assert cones.project_dual(-s).abs().max() < tolerance  # −s is in the polar of K*


def test_membership_of_curved_cones_by_their_definition() -> None:
    cones = inv.Cones(exp=1, power=(0.3,))
    v = points(cones, 500)
    s = cones.project_dual(v) - v
    for row in s[
        (s[:, 1] > 1e-5) & (s[:, 3:5] > 1e-5).all(-1)
    ].tolist():  # else y − v has lost too many digits
        assert is_in_exp(row[:3], 1e-12)
        assert is_in_power(row[3:], 0.3, 1e-12)


@pytest.mark.parametrize("exponent", [-60.0, -20.0, -3.0, 3.0, 20.0, 60.0, 1e4])
def test_far_out_on_the_exponential_cone(exponent: float) -> None:
    """w = s − y with s on the ray (ρ, 1, e^ρ) and y on its normal: the projection must be s."""
    cones = inv.Cones(exp=1)
    rho = torch.tensor(max(min(exponent, 60.0), -60.0), dtype=F64)
    one = torch.ones((), dtype=F64)
    s = torch.stack([rho, one, rho.exp()]) / max(1.0, float(rho.exp()))
    y = torch.stack([-one, rho - 1, (-rho).exp()]) / max(1.0, float((-rho).exp()))
    found = cones.project_dual(y - s)
    assert (found - y).abs().max() < 1e-14 * max(1.0, float(y.abs().max()), float(s.abs().max()))
    derivative = torch.func.jacrev(cones.project_dual)(y - s)
    assert derivative.isfinite().all()
    assert torch.linalg.eigvalsh(derivative).min() > -1e-12
    assert torch.linalg.eigvalsh(derivative).max() < 1 + 1e-12


@pytest.mark.parametrize("alpha", [0.02, 0.3, 0.98])
def test_almost_flat_power_cones(alpha: float) -> None:
    """Here a coordinate of s can be 1e-40, and is still known to all digits."""
    cones = inv.Cones(power=(alpha,))
    v = points(cones, 400, seed=3)
    derivative = torch.func.vmap(torch.func.jacrev(cones.project_dual))(v)
    step = 1e-6 * points(cones, 400, 1.0, seed=4)
    difference = 0.5 * (cones.project_dual(v + step) - cones.project_dual(v - step))
    error = ((derivative @ step.unsqueeze(-1)).squeeze(-1) - difference).abs().amax(-1) / 1e-6
    assert error.quantile(0.98) < 1e-7  # the others are next to a kink


def test_first_and_second_derivatives(cones: inv.Cones) -> None:
    v = points(cones, 2, seed=1).requires_grad_()
    assert gradcheck(cones.project_dual, v, check_forward_ad=True)
    assert gradgradcheck(cones.project_dual, v, fast_mode=True)


def test_third_derivatives() -> None:
    cones = inv.Cones(soc=(3,), psd=(3,), exp=1, power=(0.4,))

    def second(v: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(cones.project_dual(v).sin().sum(), v, create_graph=True)
        return torch.autograd.grad(first.cos().sum(), v, create_graph=True)[0]

    assert gradcheck(lambda v: second(v), points(cones, 1, seed=2).requires_grad_(), atol=1e-6)


def test_every_transform_agrees(cones: inv.Cones) -> None:
    v = points(cones, 3, seed=1)
    f = cones.project_dual
    expected = torch.stack([torch.autograd.functional.jacobian(f, row) for row in v])
    for jacobian in (torch.func.jacrev(f), torch.func.jacfwd(f)):
        torch.testing.assert_close(torch.func.vmap(jacobian)(v), expected, rtol=0, atol=1e-12)
    hessian = torch.func.vmap(torch.func.jacfwd(torch.func.jacrev(lambda v: f(v).sin().sum())))(v)
    for row, found in zip(v, hessian, strict=True):
        exact = torch.autograd.functional.hessian(lambda v: f(v).sin().sum(), row)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


def test_equal_eigenvalues_have_derivatives() -> None:
    """The identity has one eigenvalue, and no derivative of its eigenvectors."""
    cones = inv.Cones(psd=(3,))
    v = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=F64, requires_grad=True)
    assert gradcheck(cones.project_dual, v)
    assert gradgradcheck(cones.project_dual, v)
    mixed = torch.tensor([1.0, 0, 1, 0, 0, -1], dtype=F64, requires_grad=True)
    assert gradgradcheck(cones.project_dual, mixed)


def test_nested_forward_mode_raises_where_it_would_be_wrong() -> None:
    f = inv.Cones(exp=1).project_dual
    v = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    with pytest.raises(inv.UnsupportedTransformError, match=r"nested forward mode .* exponential cone"):
        torch.func.jacfwd(torch.func.jacfwd(f))(v)
    soc = inv.Cones(soc=(3,)).project_dual  # plain torch: exact
    twice = torch.func.jacfwd(torch.func.jacfwd(soc))(v)
    torch.testing.assert_close(twice, torch.func.jacrev(torch.func.jacrev(soc))(v), rtol=0, atol=1e-14)


def test_nan_stays_with_its_sample() -> None:
    cones = PRODUCTS["all, sizes out of order"]
    v = points(cones, 3)
    clean = cones.project_dual(v)
    v[1] = torch.nan
    found = cones.project_dual(v)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert found[1, 0].isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zero": -1}, "numbers of entries >= 0"),
        ({"soc": (0,)}, ">= 1"),
        ({"power": (1.0,)}, "between 0 and 1"),
    ],
)
def test_bad_cones(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        inv.Cones(**arguments)
