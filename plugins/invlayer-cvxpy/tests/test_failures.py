"""Programs without a solution, and solvers that stop early: the affair of their own sample."""

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_cvxpy import CvxpyLayer


def projection(**keywords: object) -> CvxpyLayer:
    """The nearest point with lower ≤ x ≤ upper."""
    x, c, lower, upper = cp.Variable(3), cp.Parameter(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x >= lower, x <= upper, cp.sum(x) == 1])
    return CvxpyLayer(problem, [c, lower, upper], [x], **keywords)


def inputs() -> list[Tensor]:
    return [torch.randn(8, 3).requires_grad_(), torch.zeros(8, 3), torch.ones(8, 3)]


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp"])
@pytest.mark.parametrize("policy", ["nan", "zero_grad"])
def test_one_infeasible_sample_of_eight_leaves_the_others_untouched(solver: str, policy: str) -> None:
    layer = projection(solver=solver, on_failure=policy, return_info=True)
    clean, hurt = inputs(), inputs()
    hurt[0] = clean[0].detach().clone().requires_grad_()
    hurt[2] = hurt[2].clone()
    hurt[2][5] = -1.0  # x ≥ 0 and x ≤ −1
    results = []
    for tensors in (clean, hurt):
        (found,), info = layer(*tensors)
        (gradient,) = torch.autograd.grad((found * torch.randn(8, 3, generator=seeded())).sum(), tensors[0])
        results.append((found.detach(), gradient, info))
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(results[0][0][others], results[1][0][others])
    assert torch.equal(results[0][1][others], results[1][1][others])
    info = results[1][2]
    assert info.status[5] == inv.Status.NO_SOLUTION
    assert info.ok.tolist() == [i != 5 for i in range(8)]
    assert "nfeasible" in info.message[5]
    bad = results[1][1][5]
    assert bad.isnan().all() if policy == "nan" else bool((bad == 0).all())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_by_default_an_infeasible_sample_is_an_error_that_names_it() -> None:
    tensors = inputs()
    tensors[2][5] = -1.0
    with pytest.raises(inv.ConvergenceError, match=r"(?s)cvxpy.clarabel: 1 of 8.*sample 5.*PrimalInfeasible"):
        projection()(*tensors)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_unbounded(solver: str) -> None:
    x, a = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(a @ x + cp.square(x[0])), [x >= 0])
    layer = CvxpyLayer(problem, [a], [x], solver=solver, on_failure="nan", return_info=True)
    (found,), info = layer(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert info.ok.tolist() == [True, False]
    assert info.message[1] in ("Clarabel: DualInfeasible", "SCS: unbounded")
    assert found[1].isnan().all()


@pytest.mark.parametrize(
    ("solver", "options"),
    [("clarabel", {"max_iter": 2}), ("scs", {"max_iters": 2}), ("osqp", {"max_iter": 2, "polishing": False})],
)
def test_a_solver_that_stops_early_is_caught_or_polished(solver: str, options: dict[str, object]) -> None:
    with pytest.raises(inv.ConvergenceError, match="measured residual"):
        projection(solver=solver, solver_args=options, polish=0)(*inputs())


def test_polishing_repairs_a_loose_solve() -> None:
    loose = projection(solver="scs", solver_args={"eps": 1e-3}, return_info=True)
    (found,), info = loose(*inputs())
    assert info.residual.max() < 1e-14
    assert int(info.polish.max()) >= 1
    torch.testing.assert_close(found, projection()(*inputs_again())[0], rtol=0, atol=1e-12)


def inputs_again() -> list[Tensor]:
    torch.manual_seed(0)
    return inputs()


def test_nan_in_a_parameter_stays_with_its_sample() -> None:
    tensors = inputs()
    clean = projection()(*tensors)[0]
    with torch.no_grad():
        tensors[0][2, 1] = torch.nan
    (found,), info = projection(on_failure="nan", return_info=True)(*tensors)
    assert info.ok.tolist() == [i != 2 for i in range(8)]
    others = [i for i in range(8) if i != 2]
    assert torch.equal(found[others], clean[others])


def test_an_inactive_constraint_with_a_variable_of_its_own_is_no_trouble() -> None:
    """The epigraph variable of an inactive norm is not unique: J is singular, and the gradient is defined."""
    x, c, r = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= r]), [c, r], [x])
    values = torch.randn(2, 3).requires_grad_(), torch.tensor([100.0, 0.5]).requires_grad_()
    (found,) = layer(*values)
    exact = torch.stack([values[0][0], values[1][1] * values[0][1] / values[0][1].norm()])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), values),
        torch.autograd.grad(exact.sin().sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
