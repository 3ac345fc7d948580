"""CasadiLayer on nonlinear and quadratic programs: gradients, degenerate cases, failures, inputs."""

import copy
import math
import pickle
import threading
import warnings

import casadi as ca
import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi import CasadiLayer
from invlayer_core.adjoints import Implicit
from invlayer_core.linear.factor_bank import FactorBank

F64 = torch.float64
INF = math.inf


def hs071(kind=ca.SX) -> dict:
    """Hock & Schittkowski 71, with two parameters."""
    x, p = kind.sym("x", 4), kind.sym("p", 2)
    f = x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2] * p[0]
    return {"x": x, "p": p, "f": f, "g": ca.vertcat(x[0] * x[1] * x[2] * x[3], ca.sumsqr(x) + p[1])}


START = torch.tensor([1.0, 5.0, 5.0, 1.0], dtype=F64)
P = torch.tensor([[1.0, 0.0], [1.1, 0.1]], dtype=F64)


def bounds() -> dict[str, Tensor]:
    return {
        "lbx": torch.ones(4, dtype=F64),
        "ubx": torch.tensor([5.0, 4.5, 5.0, 5.0], dtype=F64),  # the second is active
        "lbg": torch.tensor([25.0, 40.0], dtype=F64),
        "ubg": torch.tensor([INF, 40.0], dtype=F64),
    }


def chain(links: int = 30) -> tuple[dict, dict]:
    """A hanging chain above a floor, its ends fixed: sparse, with active inequalities."""
    x, p = ca.SX.sym("x", 2 * links), ca.SX.sym("p", 3)  # height of the right end, stiffness, floor
    horizontal = ca.vertcat(0, x[:links], 2)
    vertical = ca.vertcat(1, x[links:], p[0])
    stretch = [(ca.diff(horizontal)[i]) ** 2 + (ca.diff(vertical)[i]) ** 2 for i in range(links + 1)]
    f = p[1] * links * sum(s * (1 + s) for s in stretch) + 3 * ca.sum1(x[links:])
    start = np.concatenate([np.linspace(0, 2, links + 2)[1:-1], np.ones(links)])
    return (
        {"x": x, "p": p, "f": f, "g": x[links:] - p[2] * (1 + 0.1 * x[:links])},
        {"lbg": 0.0, "x0": torch.tensor(start)},
    )


# ---- gradients


@pytest.mark.parametrize("name", ["p", "lbx", "ubx", "lbg", "ubg"])
def test_gradcheck_of_every_input_on_hs071(name: str) -> None:
    layer = CasadiLayer(hs071(), outputs=("x", "f", "g", "lam_x", "lam_g"))
    given = {"p": P.clone(), **bounds(), "x0": START}
    if name == "ubg":  # the equation stays one, the inequality turns round
        given["lbg"] = torch.tensor([-INF, 40.0], dtype=F64)

    def solve(value: Tensor):
        inputs = dict(given)
        if name in ("lbg", "ubg"):
            inequality, equation = value.unbind(-1)
            inputs[name] = torch.stack([inequality, equation], -1)
            other = "ubg" if name == "lbg" else "lbg"
            inputs[other] = torch.stack([given[other][..., 0].expand_as(equation), equation], -1)
        else:
            inputs[name] = value
        return layer(inputs.pop("p"), **inputs)

    value = given[name].clone()
    if name == "ubg":
        value = torch.tensor([24.0, 40.0], dtype=F64)  # below what x would like
    value.requires_grad_()
    assert torch.autograd.gradcheck(solve, value, check_forward_ad=True, check_batched_grad=True, atol=1e-7)
    if name in ("p", "ubg"):
        assert torch.autograd.gradgradcheck(solve, value, atol=1e-6)


def test_values_on_hs071() -> None:
    layer = CasadiLayer(hs071(), outputs=("x", "f", "g", "lam_g", "lam_x"))
    given = {**bounds(), "ubx": 5.0}
    x, f, g, lam_g, lam_x = layer(P[0], x0=START, **given)
    expected = [1.0, 4.7429996418092970, 3.8211499817883077, 1.3794082897556986]  # f* = 17.0140172891563
    torch.testing.assert_close(x, torch.tensor(expected, dtype=F64), rtol=1e-8, atol=0)
    assert float(f) == pytest.approx(17.014017289156315, rel=1e-9)
    torch.testing.assert_close(g, torch.tensor([25.0, 40.0], dtype=F64), rtol=1e-12, atol=0)
    assert lam_g[0] < 0 < lam_g[1]  # CasADi's signs: negative at a lower bound
    assert lam_x[0] < -1
    assert lam_x[1:].abs().max() < 1e-12


def test_sparse_factors_against_dense_blocks_and_differences() -> None:
    problem, given = chain()
    sparse = CasadiLayer(problem)
    dense = CasadiLayer(problem, adjoint=Implicit(linear_solver=inv.linear.LU()))
    p = torch.tensor([[0.8, 2.0, 0.5], [0.6, 1.5, 0.55]], dtype=F64, requires_grad=True)
    results = []
    for layer in (sparse, dense):
        x = layer(p, **given)
        (first,) = torch.autograd.grad(torch.sin(x).sum(), p, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), p)
        results.append((x, first, second))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)
    assert (results[0][0][:, 30:] < 0.5 * 1.25).any()  # the floor is touched
    assert torch.autograd.gradcheck(lambda p: sparse(p, **given), p, check_forward_ad=True, atol=1e-6)


@pytest.mark.parametrize("activity", ["exact", "soft"])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 300.0])
def test_entries_of_the_jacobian_are_the_derivative_of_the_conditions(activity: str, factor: float) -> None:
    problem, given = chain(12)
    layer = CasadiLayer({**problem, "f": factor * problem["f"]}, activity=activity).problem
    p = torch.tensor([0.8, 2.0, 0.5], dtype=F64)
    values = layer._read(p, {"lbg": 0.01, "ubg": 1.0, "lbx": 0.1, **given})
    unit = layer.conditions.unit(values["x0"], p, values["lam_g0"])
    args = [values[name] for name in ("p", "lbx", "ubx", "lbg", "ubg")] + [unit]
    z = torch.cat([values["x0"], torch.randn(layer.size - 24, dtype=F64)])
    expected = torch.func.jacrev(lambda z: layer.conditions(z, *args))(z)
    torch.testing.assert_close(layer.jacobian(z, *args), expected, rtol=1e-12, atol=1e-12 * factor)
    pattern = layer.jacobian.pattern
    entries = layer.jacobian.entries(z, *args)
    vector = torch.randn(layer.size, dtype=F64)
    torch.testing.assert_close(pattern.product(entries, vector), expected @ vector, rtol=1e-11, atol=1e-11)


def test_the_curvature_is_that_of_the_point_asked_for() -> None:
    x, p = ca.SX.sym("x", 3), ca.SX.sym("p")
    conditions = CasadiLayer({"x": x, "p": p, "f": p * ca.sum1(x**4)}).problem.conditions.of_one_call()
    p, lam_g = torch.ones(2, 1, dtype=F64), torch.zeros(2, 0, dtype=F64)
    for size in (1.0, 3.0, 3.0, 1.0):
        x = torch.full((2, 3), size, dtype=F64)
        curvature = conditions.curvature(x, p, lam_g, conditions.program.first(x, p, lam_g)[0])
        torch.testing.assert_close(curvature, torch.full((2, 1), 12 * size**2, dtype=F64), rtol=0.1, atol=0)


def test_the_factors_of_the_last_newton_step_serve_the_derivative(monkeypatch) -> None:
    problem, given = chain()
    layer = CasadiLayer(problem, return_info=True)
    p = torch.tensor([[0.8, 2.0, 0.5], [0.6, 1.5, 0.55]], dtype=F64, requires_grad=True)
    x, info = layer(p, **given)
    assert (info.polish > 0).all()
    made = []
    original = FactorBank.factorise
    monkeypatch.setattr(FactorBank, "factorise", lambda *a, **k: made.append(1) or original(*a, **k))
    monkeypatch.setattr("invlayer_core.adjoints.sparse.solve_sparse", None)  # the longer way
    (gradient,) = torch.autograd.grad(torch.sin(x).sum(), p)
    assert not made
    monkeypatch.undo()
    dense = CasadiLayer(problem, adjoint=Implicit(linear_solver=inv.linear.LU()))(p, **given)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(torch.sin(dense).sum(), p)[0], rtol=1e-11, atol=1e-11
    )


def test_torch_func() -> None:
    layer = CasadiLayer(hs071())
    solve = lambda p: layer(p, x0=START, **bounds())  # noqa: E731
    torch.testing.assert_close(torch.vmap(solve)(P), solve(P), rtol=1e-12, atol=1e-12)
    reverse, forward = (torch.vmap(j(solve))(P) for j in (torch.func.jacrev, torch.func.jacfwd))
    torch.testing.assert_close(reverse, forward, rtol=1e-10, atol=1e-11)
    problem, given = chain()
    sparse = CasadiLayer(problem)
    p = torch.tensor([0.8, 2.0, 0.5], dtype=F64)
    reverse = torch.func.jacrev(lambda p: sparse(p, **given))(p)
    plain = torch.autograd.functional.jacobian(lambda p: sparse(p, **given), p)
    torch.testing.assert_close(reverse, plain, rtol=1e-8, atol=1e-9)
    with pytest.raises(inv.UnsupportedTransformError, match="nested forward mode"):
        torch.func.jacfwd(lambda p: sparse(p, **given))(p)  # SparseLU certifies by a jvp of its own


def test_backward_through_a_mapped_layer_with_factors_handed_over() -> None:
    problem, given = chain()
    layer = CasadiLayer(problem)
    p = torch.tensor([[0.8, 2.0, 0.5], [0.6, 1.5, 0.55]], dtype=F64, requires_grad=True)
    plain = torch.autograd.grad(layer(p, **given).sum(), p)[0]
    mapped = torch.autograd.grad(torch.vmap(lambda p: layer(p, **given))(p).sum(), p)[0]
    torch.testing.assert_close(mapped, plain, rtol=1e-9, atol=1e-10)


def test_soft_activity_is_the_derivative_of_the_barrier_point() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    problem = {"x": x, "p": p, "f": ca.sumsqr(x - p) + ca.exp(x[0] - x[1]), "g": x[0] + 2 * x[1]}
    barrier = {"ipopt.mu_target": 1e-2, "ipopt.tol": 1e-13, "ipopt.compl_inf_tol": 1e-13}
    barrier |= {"ipopt.mu_strategy": "monotone", "ipopt.bound_relax_factor": 0.0}
    given = {"lbx": 0.0, "ubg": 1.0}
    p = torch.tensor([0.9, 0.3], dtype=F64)
    values = CasadiLayer(problem, options=barrier, activity="soft", atol=1.0)
    soft = torch.func.jacrev(lambda p: values(p, **given))(p)
    step = 1e-5 * torch.eye(2, dtype=F64)
    difference = (values(p + step, **given) - values(p - step, **given)).T / 2e-5
    torch.testing.assert_close(soft, difference, rtol=2e-4, atol=2e-4)
    exact = CasadiLayer(problem, options=barrier, atol=1.0, polish=0)
    hard = torch.func.jacrev(lambda p: exact(p, **given))(p)
    assert (hard - difference).abs().max() > 1e-2


# ---- degenerate problems


def test_an_equation_with_multiplier_zero_keeps_its_gradient() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p")
    layer = CasadiLayer({"x": x, "p": p, "f": ca.sumsqr(x), "g": x[0] - x[1] - p}, outputs=("x", "lam_g"))
    p = torch.zeros(1, dtype=F64, requires_grad=True)
    solution, multiplier = layer(p, lbg=0.0, ubg=0.0)
    assert multiplier.abs().max() < 1e-12
    gradient = torch.func.jacrev(lambda p: layer(p, lbg=0.0, ubg=0.0)[0])(p)
    torch.testing.assert_close(gradient, torch.tensor([[0.5], [-0.5]], dtype=F64), rtol=1e-12, atol=0)
    assert not solution.any()


@pytest.mark.parametrize("factor", [1e-8, 1e-4, 1e4, 1e8])
def test_the_units_of_the_objective_do_not_matter(factor: float) -> None:
    problem = hs071()
    scaled = {**problem, "f": factor * problem["f"]}
    options = {"ipopt.obj_scaling_factor": 1.0 / factor}
    gradients = []
    for each, settings in ((problem, {}), (scaled, options)):
        layer = CasadiLayer(each, options=settings, atol=1e-4)
        gradients.append(torch.func.jacrev(lambda p, layer=layer: layer(p, x0=START, **bounds()))(P[0]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)


def test_a_solver_that_the_units_of_the_objective_deceive_is_caught() -> None:
    """ipopt's tolerance is absolute: for an objective this small it takes any point for optimal."""
    problem = hs071()
    layer = CasadiLayer({**problem, "f": 1e-8 * problem["f"]}, on_failure="nan", return_info=True)
    _, info = layer(P[0], x0=START, **bounds())
    assert info.message[0] == "Solve_Succeeded"
    assert info.status[0] is inv.Status.FALSE_CONVERGENCE


def test_a_weakly_active_constraint_is_a_warning() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    layer = CasadiLayer({"x": x, "p": p, "f": ca.sumsqr(x - p)})
    p = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    with pytest.warns(inv.DegeneracyWarning, match=r"active constraint \(sample 0: x\[0\]\).*one-") as seen:
        x = layer(p, lbx=0.0)
    assert seen[0].filename == __file__  # the user's line
    (gradient,) = torch.autograd.grad(x.sum(), p)
    assert float(gradient[0]) in (0.0, 1.0)
    assert float(gradient[1]) == pytest.approx(1.0, rel=1e-12)


def test_dependent_equations_keep_the_gradient_of_x_and_refuse_that_of_multipliers() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    line = ca.sum1(x) - 1
    layer = CasadiLayer(
        {"x": x, "p": p, "f": ca.sumsqr(x - p), "g": ca.vertcat(line, 2 * line)}, outputs=("x", "lam_g")
    )
    p = torch.tensor([2.0, 0.5], dtype=F64, requires_grad=True)
    solution, multipliers = layer(p, lbg=0.0, ubg=0.0)
    (gradient,) = torch.autograd.grad(solution[0], p, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([0.5, -0.5], dtype=F64), rtol=1e-10, atol=0)
    with pytest.raises(inv.SingularJacobianError):
        torch.autograd.grad(multipliers[0], p)


def test_a_flat_minimum_raises_at_the_derivative() -> None:
    x, p = ca.SX.sym("x"), ca.SX.sym("p")
    layer = CasadiLayer({"x": x, "p": p, "f": (x - p) ** 4})
    p = torch.tensor([1.0], dtype=F64, requires_grad=True)
    x = layer(p, x0=1.0)
    with pytest.raises(inv.SingularJacobianError):
        x.backward()


def test_a_fixed_variable_is_an_equation() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p")
    layer = CasadiLayer({"x": x, "p": p, "f": (x[1] - x[0] * p) ** 2 + ca.sumsqr(x)}, outputs=("x", "lam_x"))
    p = torch.tensor([2.0], dtype=F64)
    fixed = torch.tensor([3.0, -INF], dtype=F64, requires_grad=True)
    solve = lambda p, low: layer(p, lbx=low, ubx=torch.stack([low[0], -low[1]]))[0]  # noqa: E731
    torch.testing.assert_close(solve(p, fixed), torch.tensor([3.0, 3.0], dtype=F64), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(solve(p, fixed)[1], fixed)
    assert float(gradient[0]) == pytest.approx(1.0, rel=1e-10)  # x₁ = x₀ p / 2


# ---- failures


@pytest.mark.parametrize("bad", ["NaN", "infeasible"])
@pytest.mark.parametrize("solver", ["ipopt", "sqpmethod"])
def test_a_bad_sample_leaves_the_others_untouched(solver: str, bad: str) -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    layer = CasadiLayer(
        {"x": x, "p": p, "f": ca.sumsqr(x - p) + ca.exp(x[0]), "g": ca.sumsqr(x)}, solver, on_failure="nan",
        return_info=True, options={"show_eval_warnings": False},
    )  # fmt: skip
    p = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    low, high = torch.full((8, 1), -INF, dtype=F64), torch.ones(8, 1, dtype=F64)
    theirs = p.clone().requires_grad_()
    healthy, info = layer(theirs, lbg=low, ubg=high)
    assert info.ok.all()
    (expected,) = torch.autograd.grad(healthy.sum(), theirs)
    if bad == "NaN":
        p[3, 0] = math.nan
    else:
        high[3] = -1.0
    p.requires_grad_()
    x, info = layer(p, lbg=low, ubg=high)
    assert [bool(ok) for ok in info.ok] == [i != 3 for i in range(8)]
    others = torch.arange(8) != 3
    assert torch.equal(x[others], healthy[others])
    (gradient,) = torch.autograd.grad(x.sum(), p)
    torch.testing.assert_close(gradient[others], expected[others], rtol=1e-10, atol=1e-10)
    assert gradient[3].isnan().all()


def test_success_on_an_infeasible_problem_is_not_believed() -> None:
    """sleqp says success."""
    x, p = ca.SX.sym("x"), ca.SX.sym("p")
    problem = {"x": x, "p": p, "f": x**2, "g": ca.vertcat(x, -x)}
    layer = CasadiLayer(problem, "sleqp", on_failure="nan", return_info=True)
    _, info = layer(torch.ones(1, dtype=F64), lbg=1.0)  # x ≥ 1 and −x ≥ 1
    assert not info.ok.any()
    assert info.status[0] in (inv.Status.FALSE_CONVERGENCE, inv.Status.NOT_CONVERGED)
    with pytest.raises(inv.ConvergenceError, match="measured residual"):
        CasadiLayer(problem)(torch.ones(1, dtype=F64), lbg=1.0)


# ---- inputs, outputs, ways to make a layer


def test_warm_start_takes_fewer_iterations() -> None:
    options = {"ipopt.warm_start_init_point": "yes", "ipopt.mu_init": 1e-6}
    options |= {"ipopt.warm_start_bound_push": 1e-8, "ipopt.warm_start_mult_bound_push": 1e-8}
    problem, given = hs071(), bounds()
    cold = CasadiLayer(problem, outputs=("x", "lam_x", "lam_g"), return_info=True)
    (x, lam_x, lam_g), first = cold(P, x0=START, **given)
    warm = CasadiLayer(problem, options=options, return_info=True)
    again, second = warm(P, x0=x, lam_x0=lam_x, lam_g0=lam_g, **given)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
    assert (second.iterations < first.iterations - 2).all()
    assert second.message == ("Solve_Succeeded",) * 2


def test_batch_dims_broadcast_and_dtypes_are_kept() -> None:
    layer = CasadiLayer(hs071())
    given = bounds()
    tighter = torch.tensor([[[5.0, 5.0, 5.0, 5.0]], [[5.0, 4.5, 5.0, 5.0]]], dtype=F64)
    x = layer(P, x0=START, **{**given, "ubx": tighter})
    assert x.shape == (2, 2, 4)
    torch.testing.assert_close(x[1], layer(P, x0=START, **given), rtol=1e-10, atol=1e-10)
    single = layer(P.float(), x0=START.float(), **{name: value.float() for name, value in given.items()})
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x[1], rtol=1e-5, atol=1e-5)
    assert layer(P[:0], x0=START, **given).shape == (0, 4)


def test_problems_without_parameters_or_constraints() -> None:
    x = ca.SX.sym("x", 2)
    layer = CasadiLayer({"x": x, "f": ca.sumsqr(x - 1)})
    ub = torch.tensor([0.5, 3.0], dtype=F64, requires_grad=True)
    x = layer(ubx=ub)
    torch.testing.assert_close(x, torch.tensor([0.5, 1.0], dtype=F64))
    (gradient,) = torch.autograd.grad(x.sum(), ub)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0], dtype=F64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [ca.SX, ca.MX])
def test_functions_made_by_nlpsol(kind) -> None:
    quiet = {"ipopt.print_level": 0, "ipopt.sb": "yes", "print_time": False}
    layer = CasadiLayer.from_nlpsol(ca.nlpsol("S", "ipopt", hs071(kind), quiet), outputs=("x", "f"))
    x, _ = layer(P, x0=START, **bounds())
    torch.testing.assert_close(x, CasadiLayer(hs071())(P, x0=START, **bounds()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["sqpmethod", "qrsqp", "fatrop", "alpaqa"])
def test_other_plugins(solver: str) -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    problem = {"x": x, "p": p, "f": ca.sumsqr(x - p) + ca.exp(x[0]), "g": x[0] + 2 * x[1]}
    p = torch.tensor([[0.2, 0.9], [0.5, -0.4]], dtype=F64, requires_grad=True)
    results = []
    for each in ("ipopt", solver):
        x = CasadiLayer(problem, each)(p, lbx=-0.2, ubg=1.0)
        results.append((x, torch.autograd.grad(x.square().sum(), p)[0]))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["qrqp", "daqp", "qpoases", "osqp", "highs", "proxqp"])
def test_quadratic_programs(solver: str) -> None:
    x, p = ca.SX.sym("x", 3), ca.SX.sym("p", 3)
    hessian = ca.DM([[3, 1, 0], [1, 2, 0.5], [0, 0.5, 1]])
    problem = {"x": x, "p": p, "f": ca.bilin(hessian, x, x) / 2 - ca.dot(p, x), "g": ca.sum1(x)}
    layer = CasadiLayer.from_qp(problem, solver, outputs=("x", "lam_g"))
    p = torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 0.3]], dtype=F64, requires_grad=True)
    solve = lambda p: layer(p, lbx=0.0, lbg=1.0, ubg=1.0)  # noqa: E731
    x, _ = solve(p)
    assert x.min() == 0 or x.min() > -1e-12
    torch.testing.assert_close(x.sum(-1), torch.ones(2, dtype=F64))
    assert torch.autograd.gradcheck(solve, p, atol=1e-7)


@pytest.mark.parametrize("solver", ["qrqp", "daqp", "qpoases"])
def test_conic_functions_with_their_matrices_as_inputs(solver: str) -> None:
    shapes = {"h": ca.Sparsity.dense(3, 3), "a": ca.Sparsity.triplet(2, 3, [0, 0, 1, 1], [0, 1, 1, 2])}
    quiet = {"qrqp": {"print_iter": False, "print_header": False, "print_info": False}}
    quiet["qpoases"] = {"printLevel": "none"}
    layer = CasadiLayer.from_conic(
        ca.conic("qp", solver, shapes, quiet.get(solver, {})), outputs=("x", "lam_a", "cost")
    )
    generator = torch.Generator().manual_seed(0)
    root = torch.rand(2, 3, 3, generator=generator, dtype=F64)
    h = (root @ root.mT + torch.eye(3, dtype=F64)).requires_grad_()
    g, a = (torch.randn(*s, generator=generator, dtype=F64).requires_grad_() for s in ((2, 3), (2, 3)))
    limit = torch.tensor([0.3, 0.2], dtype=F64, requires_grad=True)

    def solve(h: Tensor, g: Tensor, a: Tensor, limit: Tensor):
        return layer((h + h.mT) / 2, g, a, uba=limit, lba=-limit, lbx=-1.0)

    x, lam_a, cost = solve(h, g, a, limit)
    torch.testing.assert_close(
        cost[:, 0], ((x.unsqueeze(1) @ h @ x.unsqueeze(-1))[:, 0, 0] / 2 + (g * x).sum(-1))
    )
    assert ((a * layer.problem.pattern_of_a) @ x.unsqueeze(-1)).squeeze(-1).abs().max() < 0.3 + 1e-12
    assert (lam_a != 0).any()
    assert torch.autograd.gradcheck(lambda *inputs: solve(*inputs)[:2], (h, g, a, limit), atol=1e-6)
    with pytest.raises(inv.ConditionsError, match=r"'g' came with shape \(2,\)"):
        layer(h, torch.ones(2, dtype=F64), a)
    with pytest.raises(inv.ConditionsError, match=r"made by casadi.conic"):
        CasadiLayer.from_conic(ca.Function())
    with pytest.raises(inv.ConditionsError, match=r"outputs='lam_g': accepted are"):
        CasadiLayer.from_conic(layer.problem.function, outputs="lam_g")
    with pytest.raises(TypeError, match=r"unknown inputs \['lbg'\]; accepted are"):
        layer(h, g, a, lbg=0.0)


def test_opti_parameters_and_outputs_of_any_shape() -> None:
    opti = ca.Opti()
    x, weight, target = opti.variable(2, 2), opti.parameter(), opti.parameter(2, 2)
    opti.minimize(ca.sumsqr(x - target) + weight * ca.sumsqr(x))
    above = ca.sum1(ca.vec(x)) >= 2
    opti.subject_to(above)
    opti.subject_to(opti.bounded(0, ca.vec(x), 3))
    layer = CasadiLayer.from_opti(opti, [weight, target], [x, opti.dual(above), x[0, :] * weight])
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(3, 1, generator=generator, dtype=F64).requires_grad_()
    target = torch.rand(3, 2, 2, generator=generator, dtype=F64).requires_grad_()
    x, dual, row = layer(weight, target)
    assert (x.shape, dual.shape, row.shape) == ((3, 2, 2), (3, 1), (3, 1, 2))
    torch.testing.assert_close(x.sum((-1, -2)), torch.full((3,), 2.0, dtype=F64))
    assert torch.autograd.gradcheck(layer, (weight, target), atol=1e-7)
    with pytest.raises(
        inv.ConditionsError, match=r"parameters do not fit the stack.*every opti.parameter\(\)"
    ):
        CasadiLayer.from_opti(opti, [weight.new_zeros(1).numpy()], [opti.x])
    with pytest.raises(inv.ConditionsError, match=r"parameters do not fit the stack"):
        CasadiLayer.from_opti(opti, [opti.p[0]], [opti.x])
    with pytest.raises(inv.ConditionsError, match=r"outputs do not fit the stack"):
        CasadiLayer.from_opti(opti, [opti.p], [ca.MX.sym("z")])
    with pytest.raises(inv.ConditionsError, match=r"from_opti\(dict\): accepted is a casadi.Opti"):
        CasadiLayer.from_opti({}, [], [])
    with pytest.raises(TypeError, match=r"unknown inputs \['lbx'\]"):
        layer(weight, target, lbx=0.0)


def test_opti_uses_the_solver_that_it_was_given() -> None:
    opti = ca.Opti()
    x, p = opti.variable(2), opti.parameter(2)
    opti.minimize(ca.sumsqr(x - p))
    opti.subject_to(ca.sum1(x) == 1)
    quiet = {"print_header": False, "print_iteration": False, "print_status": False, "print_time": False}
    opti.solver(
        "sqpmethod",
        {
            **quiet,
            "qpsol": "qrqp",
            "qpsol_options": {"print_iter": False, "print_header": False, "print_info": False},
        },
    )
    layer = CasadiLayer.from_opti(opti, [p], [x], return_info=True)
    assert layer.problem.inner.function.class_name() == "Sqpmethod"
    x, info = layer(torch.tensor([2.0, 0.0], dtype=F64))
    torch.testing.assert_close(x, torch.tensor([1.5, -0.5], dtype=F64))
    assert info.ok.all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda _: CasadiLayer({"y": ca.SX.sym("y")}),
            inv.ConditionsError,
            r"has the keys \['y'\]; accepted are",
        ),
        (lambda _: CasadiLayer(hs071(), "ipotp"), inv.ConditionsError, r"solver='ipotp'\) refuses"),
        (
            lambda _: CasadiLayer(hs071(), options={"tol": 1}),
            inv.ConditionsError,
            r"refuses the problem or its",
        ),
        (lambda _: CasadiLayer(hs071(), outputs="y"), inv.ConditionsError, r"outputs='y': accepted are"),
        (lambda _: CasadiLayer(hs071(), activity="hard"), inv.ConditionsError, r"activity='hard': accepted"),
        (lambda _: CasadiLayer(hs071(), threads=0), inv.ConditionsError, r"threads=0: accepted"),
        (lambda _: CasadiLayer.from_nlpsol(ca.Function()), inv.ConditionsError, r"made by casadi.nlpsol"),
        (lambda layer: layer(), inv.ConditionsError, r"has 2 parameters, and p is missing"),
        (lambda layer: layer(P, lb=0.0), TypeError, r"unknown inputs \['lb'\]; accepted are p and"),
        (lambda layer: layer(P[:, :1]), inv.ConditionsError, r"p came with shape \(2, 1\).*\(\*batch, 2\)"),
        (lambda layer: layer(P, lbx=torch.ones(3)), inv.ConditionsError, r"lbx came with shape \(3,\)"),
        (lambda layer: layer(P, x0=torch.ones(4).long()), inv.ConditionsError, r"x0 came with .*int64"),
    ],
)
def test_what_does_not_fit_is_an_error(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(CasadiLayer(hs071()))


def test_layers_can_be_copied_and_pickled() -> None:
    layer = CasadiLayer(hs071(), threads=2)
    expected = layer(P, x0=START, **bounds())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(P, x0=START, **bounds()), expected)


def test_eight_threads_on_two_solvers() -> None:
    layers = CasadiLayer(hs071()), CasadiLayer(hs071(), "sqpmethod", threads=2)
    given = {**bounds(), "x0": START}
    expected, wrong = [layer(P, **given) for layer in layers], []

    def work() -> None:
        for _ in range(13):
            same = (torch.equal(layer(P, **given), x) for layer, x in zip(layers, expected, strict=True))
            wrong.extend([] if all(same) else [1])

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nothing_is_printed(capfd: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CasadiLayer(hs071())(P, x0=START, **bounds())
        CasadiLayer(hs071(), "sqpmethod")(P, x0=START, **bounds())
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
