"""Polish where roots are not isolated, and by sparse factors."""

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

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
