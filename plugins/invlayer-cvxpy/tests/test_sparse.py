"""Large sparse programs: sparse factors instead of dense blocks, with the same numbers."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_cvxpy import CvxpyLayer, PiecewiseConstantWarning

DENSE = {"adjoint": inv.adjoints.Implicit(singular="consistent"), "polish": "auto"}


def portfolio(n: int = 120, **keywords: object) -> CvxpyLayer:
    """A factor model of risk, with a limit of exposure that may be active or not."""
    x, mu, F, limit = cp.Variable(n), cp.Parameter(n), cp.Parameter((4, n)), cp.Parameter()
    risk = cp.sum_squares(F @ x) + cp.sum_squares(cp.multiply(np.linspace(0.3, 1, n), x))
    constraints = [cp.sum(x) == 1, x >= 0, cp.norm(F @ x) <= limit]
    return CvxpyLayer(cp.Problem(cp.Maximize(mu @ x - risk), constraints), [mu, F, limit], [x], **keywords)


def inputs(n: int = 120) -> list[Tensor]:
    return [
        torch.randn(3, n).requires_grad_(),
        torch.randn(4, n).requires_grad_(),
        torch.tensor(0.05).requires_grad_(),
    ]


def entropy(n: int = 60, **keywords: object) -> CvxpyLayer:
    x, a, F = cp.Variable(n), cp.Parameter(n), cp.Parameter((3, n))
    problem = cp.Problem(cp.Minimize(-cp.sum(cp.entr(x)) + a @ x), [F @ x == 0, cp.sum(x) == 1])
    return CvxpyLayer(problem, [a, F], [x], **keywords)


def entropy_inputs(n: int = 60) -> list[Tensor]:
    return [torch.randn(3, n).requires_grad_(), torch.randn(3, n).requires_grad_()]


def least_squares(n: int = 40, **keywords: object) -> CvxpyLayer:
    """Non-negative least squares in a ball, with a dense matrix: the Schur complement is what is small."""
    x, A, b = cp.Variable(n), cp.Parameter((2 * n, n)), cp.Parameter(2 * n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0, cp.norm(x) <= 0.8])
    return CvxpyLayer(problem, [A, b], [x], **keywords)


def least_squares_inputs(n: int = 40) -> list[Tensor]:
    return [torch.randn(2 * n, n).requires_grad_(), torch.randn(3, 2 * n).requires_grad_()]


FAMILIES = {
    "portfolio": (portfolio, inputs, "RegularisedLU"),
    "entropy": (entropy, entropy_inputs, "RegularisedLU"),
    "least squares": (least_squares, least_squares_inputs, "SchurCholesky"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_gradients_as_dense_factors(name: str) -> None:
    make, draw, factors = FAMILIES[name]
    values, sparse, dense = draw(), make(return_info=True), make(return_info=True, **DENSE)
    assert factors in repr(sparse.keywords["adjoint"])
    results = []
    for layer in (sparse, dense):
        (found,), info = layer(*values)
        assert info.residual.max() < 1e-12
        results.append((found, torch.autograd.grad(found.sin().square().sum(), values, create_graph=True)))
    assert "SparseLU" in layer_info(sparse, values)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    second = [torch.autograd.grad(sum(g.square().sum() for g in first), values) for _, first in results]
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


LSMR = {"adjoint": inv.adjoints.Implicit(linear_solver="scipy.lsmr")}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_gradients_by_products_alone(name: str) -> None:
    """LSMR, which factorises nothing, in both directions and to second order."""
    make, draw, _ = FAMILIES[name]
    values, results = draw(), []
    for keywords in (LSMR, DENSE):
        layer = make(return_info=True, **keywords)
        (found,), info = layer(*values)
        assert info.residual.max() < 1e-11
        first = torch.autograd.grad(found.sin().square().sum(), values, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), values)
        forward = () if name == "entropy" else (pushed(layer, [value.detach() for value in values]),)
        results.append((found, *first, *forward, *second))
        assert ("scipy.lsmr" in info.linear_solver) == (keywords is LSMR)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def pushed(layer: CvxpyLayer, values: list[Tensor]) -> Tensor:
    return torch.func.jvp(lambda *v: layer(*v)[0][0], tuple(values), tuple(values))[1]


def test_what_is_huge_is_not_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invlayer_cvxpy.adjoint._HUGE", 200)
    values, layer = entropy_inputs(), entropy(return_info=True)
    (found,), info = layer(*values)
    assert "scipy.lsmr" in info.linear_solver
    (ours,) = torch.autograd.grad(found.sin().sum(), values[0])
    (theirs,) = torch.autograd.grad(entropy(**DENSE)(*values)[0].sin().sum(), values[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def layer_info(layer: CvxpyLayer, values: list[Tensor]) -> str:
    return layer(*values)[1].linear_solver


def test_gradient_against_differences() -> None:
    values, layer = entropy_inputs(), entropy()
    weights = torch.randn(60)
    gradient = torch.autograd.grad((layer(*values)[0] * weights).sum(), values)
    for i, value in enumerate(values):
        direction = torch.randn(value.shape)
        moved = [[v + s * 1e-5 * direction if j == i else v for j, v in enumerate(values)] for s in (1, -1)]
        with torch.no_grad():
            ahead, behind = ((layer(*m)[0] * weights).sum() for m in moved)
        assert float((gradient[i] * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-5, abs=1e-8)


def test_torch_func() -> None:
    layer, (a, F) = entropy(), [v.detach() for v in entropy_inputs()]
    f = lambda a: layer(a, F)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(f)(a), f(a), rtol=0, atol=1e-12)
    rows = torch.func.vmap(torch.func.grad(lambda a: f(a).square().sum()))(a)
    leaf = a.clone().requires_grad_()
    (plain,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    torch.testing.assert_close(rows, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("keywords", [{}, LSMR], ids=["factors", "products"])
@pytest.mark.parametrize("limit", [0.05, 10.0])
def test_an_inactive_cone_leaves_a_singular_jacobian_and_a_right_gradient(
    limit: float, keywords: dict[str, object]
) -> None:
    values = inputs()
    values[2] = torch.tensor(limit).requires_grad_()
    results = []
    for layer in (portfolio(**keywords), portfolio(**DENSE)):
        (found,) = layer(*values)
        results.append(torch.autograd.grad(found.sin().sum(), values))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    if limit > 1:
        assert results[0][2].abs() < 1e-12


@pytest.mark.parametrize(("keywords", "name"), [({}, "RegularisedLU"), (LSMR, "scipy.lsmr")])
def test_a_solution_that_is_not_unique_is_still_flagged(keywords: dict[str, object], name: str) -> None:
    x, c = cp.Variable(300), cp.Parameter(300)
    with pytest.warns(PiecewiseConstantWarning):
        layer = CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1]), [c], [x], **keywords)
    assert layer.structure.places is not None
    (found,) = layer(torch.ones(300).requires_grad_())
    with pytest.raises(inv.SingularJacobianError, match=f"{name} found the Jacobian"):
        (found * torch.arange(300.0)).sum().backward()


def test_one_infeasible_sample_leaves_the_others_untouched() -> None:
    values = inputs()
    layer = portfolio(on_failure="zero_grad", return_info=True)
    results = []
    for limit in (torch.full((3,), 0.05), torch.tensor([0.05, -0.1, 0.05])):
        mu = values[0].detach().clone().requires_grad_()
        (found,), info = layer(mu, values[1], limit)
        results.append((found.detach(), torch.autograd.grad(found.sin().sum(), mu)[0]))
    assert info.status[1] == inv.Status.NO_SOLUTION
    for clean, hurt in zip(*results, strict=True):
        assert torch.equal(clean[[0, 2]], hurt[[0, 2]])
    assert (results[1][1][1] == 0).all()
