"""Polish where roots are not isolated, and by sparse factors."""

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.jacobians.linearize import RecordedLinearization
from invlayer_core.linear.factor_bank import FactorBank

F64 = torch.float64


def circle(y: Tensor, a: Tensor) -> Tensor:
    """The circle of radius √a, twice the same equation: every point of it is a root."""
    equation = y.square().sum(-1) - a
    return torch.stack([equation, 2 * equation], -1)


def test_polish_goes_to_the_nearest_root_of_many() -> None:
    start = torch.tensor([[1.1, 0.2], [0.3, -1.2]], dtype=F64)
    solve = inv.implicit_function(conditions=circle, polish="auto", return_info=True)(lambda a: start)
    y, info = solve(torch.ones(2, dtype=F64))
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2, dtype=F64), rtol=0, atol=1e-14)
    assert (y - start).norm(dim=-1).max() < 0.3
    assert (info.polish > 0).all()


def test_polish_ends_within_rounding() -> None:
    """From one part in a thousand, three steps of Newton's method are enough; a fourth would gain nothing."""
    a = torch.rand(5, 1, dtype=F64) + 0.5
    solve = inv.implicit_function(conditions=lambda y, a: y**2 - a, polish="auto", return_info=True)
    y, info = solve(lambda a: 1.001 * a.sqrt())(a)
    torch.testing.assert_close(y, a.sqrt(), rtol=4e-16, atol=0)
    assert int(info.polish.max()) <= 3


@pytest.mark.plugin("invlayer-scipy")
def test_polish_by_sparse_factors() -> None:
    n = 50
    matrix = 3 * torch.eye(n, dtype=F64) + torch.diag(torch.ones(n - 1, dtype=F64), 1)
    theta = torch.rand(2, n, dtype=F64)
    f = lambda y, theta: y @ matrix.T + y**3 - theta  # noqa: E731
    exact = inv.root(f, torch.zeros_like(theta), theta)
    results = []
    for method in (inv.linear.LU(), inv.linear.SparseLU(matrix != 0)):
        adjoint = inv.adjoints.Implicit(linear_solver=method)
        solve = inv.implicit_function(conditions=f, adjoint=adjoint, polish="auto", return_info=True)
        y, info = solve(lambda theta: exact + 1e-3)(theta)
        assert (info.polish > 0).all()
        results.append(y)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(results[1], exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "method", [inv.linear.LU(), pytest.param("scipy.splu", marks=pytest.mark.plugin("invlayer-scipy"))]
)
def test_what_has_arrived_does_not_move_with_others(method: object) -> None:
    """A sample's last bit does not depend on how many steps the rest of the batch takes."""
    n = 6
    if method == "scipy.splu":
        method = inv.linear.SparseLU(torch.ones(n, n, dtype=torch.bool))
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    f = lambda y, theta: y + torch.sin(y @ matrix.T) / 8 + torch.exp(y / 3) - theta  # noqa: E731
    theta = torch.rand(101, n, generator=torch.Generator().manual_seed(1), dtype=F64)
    exact = inv.root(f, torch.zeros_like(theta), theta)
    off = torch.tensor([1e-7] * 100 + [0.5], dtype=F64).unsqueeze(-1)
    adjoint = inv.adjoints.Implicit(linear_solver=method)
    polished = inv.implicit_function(conditions=f, adjoint=adjoint, polish="auto", return_info=True)
    whole, info = polished(lambda theta: exact + off)(theta)
    few, _ = polished(lambda theta: exact[:100] + off[:100])(theta[:100])
    assert int(info.polish[100]) > int(info.polish[:100].max())
    assert torch.equal(whole[:100], few)


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize("off", [1e-9, 1e-4, 0.3])
def test_factors_of_the_last_step_serve_the_derivative_where_they_fit(off: float, monkeypatch) -> None:
    n, made = 12, []
    matrix = 3 * torch.eye(n, dtype=F64) + torch.diag(torch.ones(n - 1, dtype=F64), 1)
    f = lambda y, theta: y @ matrix.T + y**3 - theta  # noqa: E731
    theta = torch.rand(3, n, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    exact = inv.root(f, torch.zeros_like(theta), theta)
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.SparseLU(matrix != 0))
    polished = inv.implicit_function(conditions=f, adjoint=adjoint, polish=1, atol=1.0)
    y = polished(lambda theta: exact.detach() + off)(theta)
    original = FactorBank.factorise
    monkeypatch.setattr(FactorBank, "factorise", lambda *a, **k: made.append(1) or original(*a, **k))
    ours = torch.autograd.grad(torch.sin(y).sum(), theta)[0]
    blocks = matrix + torch.diag_embed(3 * y.detach() ** 2)
    expected = torch.linalg.solve(blocks.mT, torch.cos(y.detach()).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    assert bool(made) == (off > 0.1)  # the step was long, and J is another


@pytest.mark.plugin("invlayer-scipy")
def test_factors_that_fit_need_one_pass_for_certificate_and_gradient(monkeypatch) -> None:
    n, passes = 12, []
    matrix = 3 * torch.eye(n, dtype=F64) + torch.diag(torch.ones(n - 1, dtype=F64), 1)
    f = lambda y, theta: y @ matrix.T + y**3 - theta  # noqa: E731
    theta = torch.rand(3, n, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.SparseLU(matrix != 0))
    y = inv.root(f, torch.zeros_like(theta), theta, adjoint=adjoint)
    first = torch.autograd.grad(torch.sin(y).sum(), theta, retain_graph=True)[0]  # makes the factors
    original = RecordedLinearization.pullback
    monkeypatch.setattr(
        RecordedLinearization, "pullback", lambda *a, **k: passes.append(1) or original(*a, **k)
    )
    monkeypatch.setattr("invlayer_core.adjoints.sparse.solve_sparse", None)  # the longer way
    again = torch.autograd.grad(torch.sin(y).sum(), theta)[0]
    torch.testing.assert_close(again, first, rtol=1e-13, atol=1e-14)
    assert len(passes) == 1
