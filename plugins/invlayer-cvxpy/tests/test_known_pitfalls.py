"""What differentiable convex layers are known to get wrong without a word, and what is right."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_cvxpy import CvxpyLayer, PiecewiseConstantWarning


def differences(layer: CvxpyLayer, value: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian of a layer with one parameter, by central differences."""
    columns = []
    for i in range(value.numel()):
        unit = torch.zeros(value.numel())
        unit[i] = step
        ahead, behind = (layer(value + s * unit.reshape(value.shape))[0] for s in (1.0, -1.0))
        columns.append((ahead - behind).reshape(-1) / (2 * step))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
@pytest.mark.parametrize("side", [2, 3, 4, 6])
def test_1_semidefinite_blocks_of_any_size(side: int, solver: str) -> None:
    """The nearest correlation matrix; duals and gradients, where entries of a triangle can be permuted."""
    X, C = cp.Variable((side, side), symmetric=True), cp.Parameter((side, side), symmetric=True)
    cone = X >> 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cone, cp.diag(X) == 1])
    layer = CvxpyLayer(problem, [C], [X, cone], solver=solver)
    half = torch.randn(side, side)
    value = half + half.T
    found, dual = layer(value)
    C.value = value.numpy()
    problem.solve(solver="CLARABEL")
    np.testing.assert_allclose(found, X.value, atol=1e-4)  # CVXPY's is the less accurate one
    np.testing.assert_allclose(dual, cone.dual_value, atol=1e-4)
    rows = torch.autograd.functional.jacobian(lambda v: layer(v)[0], value).reshape(side**2, -1)
    columns = differences(layer, value)
    torch.testing.assert_close(rows, columns, rtol=0, atol=1e-8)


def test_2_status_is_measured_per_sample() -> None:
    """One program infeasible, one unbounded: neither returns numbers or slopes, nor stops the others."""
    x, a, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(a @ x), [x >= 0, x[0] <= b])
    with pytest.warns(PiecewiseConstantWarning):
        layer = CvxpyLayer(problem, [a, b], [x], on_failure="nan", return_info=True)
    cost = torch.tensor([[-1.0, 2.0], [-1.0, 2.0], [-1.0, -2.0], [-1.0, 3.0]])
    limit = torch.tensor([1.0, -1.0, 1.0, 2.0], requires_grad=True)
    (found,), info = layer(cost, limit)
    assert info.ok.tolist() == [True, False, False, True]
    assert "PrimalInfeasible" in info.message[1]
    assert "DualInfeasible" in info.message[2]
    assert found[[1, 2]].isnan().all()
    torch.testing.assert_close(found[[0, 3]], torch.tensor([[1.0, 0.0], [2.0, 0.0]]), rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(found.sum(), limit)
    assert slope[[1, 2]].isnan().all()
    torch.testing.assert_close(slope[[0, 3]], torch.ones(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_3_power_cones(solver: str) -> None:
    """Cobb–Douglas demand: x = a / p₁, y = (1 − a) / p₂."""
    x, p = cp.Variable(3), cp.Parameter(2, pos=True)
    problem = cp.Problem(
        cp.Maximize(x[2]), [cp.PowCone3D(x[0], x[1], x[2], 0.3), p[0] * x[0] + p[1] * x[1] == 1]
    )
    layer = CvxpyLayer(problem, [p], [x], solver=solver)
    prices = torch.tensor([1.0, 4.0])
    jacobian = torch.autograd.functional.jacobian(lambda p: layer(p)[0][:2], prices)
    exact = torch.tensor([[-0.3 / 1.0**2, 0.0], [0.0, -0.7 / 4.0**2]])
    torch.testing.assert_close(jacobian, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_4_duals_of_vectors_of_cones_have_cvxpys_layout(solver: str) -> None:
    x, c, t = cp.Variable((3, 4)), cp.Parameter((3, 4)), cp.Variable(4)
    u = cp.Variable(5)
    balls = cp.SOC(t, x)
    exponentials = cp.ExpCone(u - 1, np.linspace(0.5, 1.5, 5), cp.exp(np.linspace(0, 1, 5)))
    equal = cp.sum(x, axis=0) == np.arange(4.0)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - c) + cp.sum(t) - cp.sum(u)), [balls, exponentials, equal, t <= 3]
    )
    wanted = [x, *balls.dual_variables, *exponentials.dual_variables, equal]
    layer = CvxpyLayer(problem, [c], wanted, solver=solver)
    value = torch.randn(3, 4)
    found = layer(value)
    c.value = value.numpy()
    problem.solve(solver="CLARABEL")
    expected = [x.value, *(d.value for d in balls.dual_variables)]
    expected += [*(d.value for d in exponentials.dual_variables), equal.dual_value]
    for ours, theirs in zip(found, expected, strict=True):
        assert tuple(ours.shape) == np.shape(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # CVXPY's are as accurate as √1e-8


def test_5_parametric_quad_form_and_second_derivatives() -> None:
    """x = −Q⁻¹ q without constraints."""
    x, Q, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, Q) + q @ x)), [Q, q], [x])
    half, vector = torch.randn(3, 3), torch.randn(3)

    def ours(half: Tensor, vector: Tensor) -> Tensor:
        return layer(half @ half.T + torch.eye(3), vector)[0].sin().sum()

    def exact(half: Tensor, vector: Tensor) -> Tensor:
        return -torch.linalg.solve(half @ half.T + torch.eye(3), vector).sin().sum()

    found = torch.autograd.functional.hessian(ours, (half, vector))
    expected = torch.autograd.functional.hessian(exact, (half, vector))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


def test_5_integers_name_the_adjoint_that_can_do_it() -> None:
    x, c = cp.Variable(2, integer=True, name="lots"), cp.Parameter(2)
    with pytest.raises(inv.ConditionsError, match=r"variables lots are integer.*DLM\(resolve=True\)"):
        CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c))), [c], [x])


def degenerate_lp(**keywords: object) -> CvxpyLayer:
    """min cᵀx on the simplex: with equal costs every point is a solution."""
    x, c = cp.Variable(3), cp.Parameter(3)
    with pytest.warns(PiecewiseConstantWarning, match="piecewise constant"):
        return CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1]), [c], [x], **keywords)


def test_6_a_linear_program_without_a_unique_solution_is_flagged() -> None:
    cost = torch.ones(3, requires_grad=True)
    (found,) = degenerate_lp()(cost)
    with pytest.raises(inv.SingularJacobianError, match="singular"):
        found[0].backward()
    (found,) = degenerate_lp(adjoint=inv.adjoints.Implicit(singular="lstsq"))(cost)
    (gradient,) = torch.autograd.grad(found[0], cost)
    assert gradient.isfinite().all()


def test_6_a_linear_program_with_a_unique_solution_has_zero_gradient() -> None:
    cost = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (found,) = degenerate_lp()(cost)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-12)
    assert torch.autograd.grad(found[0], cost)[0].abs().max() < 1e-12


def test_6_no_warning_with_a_regularised_objective() -> None:
    x, c = cp.Variable(3), cp.Parameter(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CvxpyLayer(cp.Problem(cp.Minimize(c @ x + cp.sum_squares(x)), [x >= 0]), [c], [x])


@pytest.mark.parametrize("count", [1, 4])
def test_7_accuracy_of_a_larger_qp_by_default(count: int) -> None:
    """n = 100, 150 inequalities, against the KKT system of the active set in torch."""
    n, m = 100, 150
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, q, G, h = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    constraint = G @ x <= h
    layer = CvxpyLayer(
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + q @ x), [constraint]), [q, G, h], [x, constraint]
    )
    values = [t.requires_grad_() for t in (draw(count, n), draw(m, n), torch.ones(m))]
    found, dual = layer(*values)
    weights = draw(count, n)
    ours = torch.autograd.grad((weights * found).sum(), values)
    total = torch.zeros(())
    for i in range(count):
        active = dual[i].detach() > 0
        A, k = values[1][active], int(active.sum())
        kkt = torch.cat([torch.cat([torch.eye(n), A.T], 1), torch.cat([A, torch.zeros(k, k)], 1)])
        exact = torch.linalg.solve(kkt, torch.cat([-values[0][i], values[2][active]]))[:n]
        assert (exact - found[i]).abs().max() < 1e-8
        total = total + (weights[i] * exact).sum()
    for mine, other in zip(ours, torch.autograd.grad(total, values), strict=True):
        assert (mine - other).abs().max() < 1e-6 * other.abs().max()
