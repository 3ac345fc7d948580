"""The layer's face: parameters, batches, attributes, options, errors."""

import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
import torch.utils.checkpoint

import invlayer_core as inv
from invlayer_cvxpy import CvxpyLayer


def box_projection(**keywords: object) -> CvxpyLayer:
    x, c, r = cp.Variable((2, 3)), cp.Parameter((2, 3), name="centre"), cp.Parameter(name="radius")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x <= r, x >= -r])
    return CvxpyLayer(problem, parameters=[c, r], variables=[x], **keywords)


@pytest.mark.parametrize("of_centre", [(), (5,), (2, 2)])
@pytest.mark.parametrize("of_radius", [False, True])
def test_any_mix_of_batched_and_shared_parameters(of_centre: tuple[int, ...], of_radius: bool) -> None:
    centre = torch.randn(*of_centre, 2, 3)
    radius = 0.3 + torch.rand(of_centre) if of_radius else torch.tensor(0.5)
    (found,) = box_projection()(centre, radius)
    bound = radius.reshape(*radius.shape, *(1 for _ in range(centre.ndim - radius.ndim)))
    torch.testing.assert_close(found, centre.clamp(-bound, bound), rtol=0, atol=1e-12)


def test_by_name_and_by_position() -> None:
    layer, centre, radius = box_projection(), torch.randn(2, 3), torch.tensor(0.5)
    expected = layer(centre, radius)[0]
    assert torch.equal(layer(centre=centre, radius=radius)[0], expected)
    assert torch.equal(layer(centre, radius=radius)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_have_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    centre = torch.randn(4, 2, 3).to(dtype).requires_grad_()
    (found,) = box_projection()(centre, torch.tensor(0.5, dtype=dtype))
    assert found.dtype == dtype
    found.sum().backward()
    assert centre.grad is not None
    assert centre.grad.dtype == dtype
    torch.testing.assert_close(centre.grad, (centre.abs() < 0.5).to(dtype))


def test_a_batch_is_its_samples() -> None:
    layer, centre = box_projection(), torch.randn(6, 2, 3)
    whole = layer(centre, torch.tensor(0.5))[0]
    for row, value in zip(whole, centre, strict=True):
        torch.testing.assert_close(layer(value, torch.tensor(0.5))[0], row, rtol=0, atol=1e-13)


def test_a_batch_of_none() -> None:
    (found,) = box_projection()(torch.zeros(0, 2, 3), torch.tensor(0.5))
    assert found.shape == (0, 2, 3)


def test_a_batched_parameter_without_influence() -> None:
    x, c, unused = cp.Variable(2), cp.Parameter(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x <= 1, 0 * unused <= 1])
    (found,) = CvxpyLayer(problem, [c, unused], [x])(torch.zeros(2), torch.zeros(3, 2))
    assert found.shape == (3, 2)


@pytest.mark.parametrize("attribute", ["symmetric", "PSD", "diag", "nonneg", "bounds", "NSD"])
def test_attributes_of_variables(attribute: str) -> None:
    value = [-0.5, 0.5] if attribute == "bounds" else True
    X, C = cp.Variable((3, 3), **{attribute: value}), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)))
    layer = CvxpyLayer(problem, [C], [X])
    matrix = torch.randn(3, 3)
    C.value = matrix.numpy()
    (found,) = layer(matrix)
    problem.solve(solver="CLARABEL")
    expected = X.value.toarray() if hasattr(X.value, "toarray") else X.value
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert torch.autograd.gradcheck(layer, matrix.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("attribute", ["symmetric", "PSD", "diag", "nonneg"])
def test_attributes_of_parameters(attribute: str) -> None:
    x, C = cp.Variable(3), cp.Parameter((3, 3), **{attribute: True})
    layer = CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(C @ x - np.arange(3)) + cp.sum_squares(x))), [C], [x]
    )
    half = torch.rand(3, 3)
    matrix = torch.diag(torch.rand(3)) if attribute == "diag" else half @ half.T
    matrix.requires_grad_()
    (found,) = layer(matrix)
    exact = torch.linalg.solve(matrix.T @ matrix + torch.eye(3), matrix.T @ torch.arange(3.0))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), matrix)[0] for y in (found, exact))
    if attribute == "diag":
        ours, theirs = ours.diagonal(), theirs.diagonal()
    elif attribute != "nonneg":  # a symmetric matrix moves symmetrically
        theirs = 0.5 * (theirs + theirs.T)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_several_variables_and_duals() -> None:
    x, y, c = cp.Variable(2), cp.Variable(), cp.Parameter(2)
    less, equal = x <= y, cp.sum(x) == 1
    layer = CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - c) + y**2), [less, equal]), [c], [y, x, less, equal]
    )
    assert [each.shape for each in layer(torch.randn(4, 2))] == [(4,), (4, 2), (4, 2), (4,)]
    assert [each.shape for each in layer(torch.randn(2))] == [(), (2,), (2,), ()]


def test_the_dual_of_an_equality_is_the_price_of_its_right_hand_side() -> None:
    """∂p*/∂b = −ν in CVXPY's sign (Boyd & Vandenberghe 2004, 5.6.3)."""
    x, b = cp.Variable(3), cp.Parameter(2)
    A = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    equal = A @ x == b
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.sum(x)), [equal]), [b], [x, equal])
    value = torch.randn(2).requires_grad_()
    found, price = layer(value)
    (gradient,) = torch.autograd.grad(found.square().sum() + found.sum(), value)
    torch.testing.assert_close(gradient, -price, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["scs", "osqp"])
def test_warm_start_takes_fewer_iterations(solver: str) -> None:
    layer = box_projection(solver=solver, return_info=True)
    centre, radius = torch.randn(3, 2, 3), torch.tensor(0.5)
    _, cold = layer(centre, radius)
    found, warm = layer(centre + 1e-6, radius, warm_start=cold)
    assert (warm.iterations <= cold.iterations).all()
    torch.testing.assert_close(found[0], (centre + 1e-6).clamp(-0.5, 0.5), rtol=0, atol=1e-12)
    with pytest.raises(inv.ConditionsError, match="accepted is the SolveInfo of an earlier call"):
        box_projection(return_info=True)(
            centre,
            radius,
            warm_start=copy.replace(cold, aux=()) if hasattr(copy, "replace") else _without_aux(cold),
        )


def _without_aux(info: inv.SolveInfo) -> inv.SolveInfo:
    from dataclasses import replace

    return replace(info, aux=())


def test_threads() -> None:
    centre, radius = torch.randn(9, 2, 3), torch.tensor(0.5)
    expected = box_projection()(centre, radius)[0]
    assert torch.equal(box_projection(n_jobs=3)(centre, radius)[0], expected)
    assert torch.equal(box_projection()(centre, radius, solver_args={"n_jobs_forward": 2})[0], expected)


def test_options_per_layer_and_per_call() -> None:
    layer = box_projection(solver_args={"verbose": False}, return_info=True)
    centre, radius = torch.randn(2, 3), torch.tensor(0.5)
    assert layer(centre, radius, solver_args={"solve_method": "SCS"})[1].solver == "cvxpy.scs"
    with pytest.raises(TypeError, match=r"cvxpy.clarabel: unknown option epsilon; accepted are"):
        layer(centre, radius, solver_args={"epsilon": 1e-3})


def test_copies_and_pickles_give_the_same() -> None:
    layer, centre, radius = box_projection(), torch.randn(2, 3), torch.tensor(0.5)
    expected = layer(centre, radius)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(centre, radius)[0], expected)


def test_the_problem_itself_is_left_alone() -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    less = x <= 1
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [less])
    layer = CvxpyLayer(problem, [c], [x, less])
    layer(torch.zeros(2))
    assert x.value is None
    assert c.value is None
    assert less.dual_value is None


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, after a break
def test_compile_breaks_the_graph_and_gives_the_same() -> None:
    layer, centre, radius = box_projection(), torch.randn(4, 2, 3).requires_grad_(), torch.tensor(0.5)
    f = lambda centre: layer(centre.sin(), radius)[0].cos()  # noqa: E731
    compiled = torch.compile(f, backend="eager")
    assert torch.equal(compiled(centre), f(centre))
    ours, theirs = (torch.autograd.grad(g(centre).sum(), centre)[0] for g in (compiled, f))
    assert torch.equal(ours, theirs)


def test_checkpoint_autocast_and_inference_mode() -> None:
    layer, centre, radius = box_projection(), torch.randn(4, 2, 3).requires_grad_(), torch.tensor(0.5)
    f = lambda centre: layer(centre, radius)[0].square().sum()  # noqa: E731
    (plain,) = torch.autograd.grad(f(centre), centre)
    again = torch.utils.checkpoint.checkpoint(f, centre, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, centre)[0], plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(centre, radius)[0], layer(centre, radius)[0].double())
    with torch.inference_mode():
        assert torch.equal(layer(centre, radius)[0], layer(centre.clone(), radius)[0])


def test_warn_on_failure() -> None:
    layer = box_projection(on_failure="warn")
    with pytest.warns(inv.ConvergenceWarning, match="NO_SOLUTION"):
        layer(torch.randn(2, 3), torch.tensor(-1.0))


def test_inside_a_module_that_learns() -> None:
    """Gradient descent on the centre finds the one whose projection is nearest a target."""
    layer, centre = box_projection(), torch.zeros(2, 3, requires_grad=True)
    target = torch.tensor([[0.1, -0.2, 0.3], [0.2, 0.1, -0.4]])
    for _ in range(30):
        (found,) = layer(centre, torch.tensor(0.5))
        (gradient,) = torch.autograd.grad((found - target).square().sum(), centre)
        centre = (centre - 0.4 * gradient).detach().requires_grad_()
    assert (layer(centre, torch.tensor(0.5))[0] - target).abs().max() < 1e-8


def test_geometric_programs_return_positive_values_and_exact_gradients() -> None:
    """min x y s.t. x ≥ a, y ≥ b/x²: x y = b / x, unbounded below in x, so bound it: x ≤ c."""
    x, y = cp.Variable(pos=True), cp.Variable(pos=True)
    b, c = cp.Parameter(pos=True), cp.Parameter(pos=True)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(x * y), [y >= b / x**2, x <= c]), [b, c], [x, y], gp=True)
    values = torch.tensor([2.0, 3.0]).requires_grad_(), torch.tensor([1.5, 0.5]).requires_grad_()
    found = layer(*values)
    exact = values[1], values[0] / values[1] ** 2
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=0)
    ours = torch.autograd.grad(sum(v.sin().sum() for v in found), values)
    theirs = torch.autograd.grad(sum(v.sin().sum() for v in exact), values)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


# Errors


def test_not_dpp_names_the_expression() -> None:
    x, a, b = cp.Variable(), cp.Parameter(name="a"), cp.Parameter(name="b")
    with pytest.raises(inv.ConditionsError, match=r"not DPP: a @ b|not DPP: a \* b") as raised:
        CvxpyLayer(cp.Problem(cp.Minimize(cp.square(x) + a * b * x)), [a, b], [x])
    assert "as a parameter of its own" in str(raised.value)


def test_not_dcp_names_the_expression() -> None:
    x, a = cp.Variable(name="x"), cp.Parameter()
    with pytest.raises(inv.ConditionsError, match=r"not DCP: .*PowerApprox|not DCP: .*sqrt|not DCP: .*power"):
        CvxpyLayer(cp.Problem(cp.Minimize(cp.sqrt(x) + a)), [a], [x])


def test_a_geometric_program_without_gp() -> None:
    x, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    with pytest.raises(inv.ConditionsError, match="pass gp=True"):
        CvxpyLayer(cp.Problem(cp.Minimize(a * x), [x * x >= a]), [a], [x])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, a, x: CvxpyLayer("problem", [a], [x]), "accepted is a cvxpy.Problem"),
        (lambda p, a, x: CvxpyLayer(p, [], [x]), r"missing are \['a'\]"),
        (lambda p, a, x: CvxpyLayer(p, [a, cp.Parameter(name="z")], [x]), r"not among them are \['z'\]"),
        (lambda p, a, x: CvxpyLayer(p, [a, a], [x]), "each of them once"),
        (lambda p, a, x: CvxpyLayer(p, [np.ones(2)], [x]), "accepted are cvxpy.Parameter"),
        (lambda p, a, x: CvxpyLayer(p, [a], [cp.Variable(name="w")]), "w is not part of the problem"),
        (lambda p, a, x: CvxpyLayer(p, [a], []), "at least one variable"),
        (lambda p, a, x: CvxpyLayer(p, [a], [x], batch="threads")(torch.zeros(2)), "batch= has no meaning"),
        (
            lambda p, a, x: CvxpyLayer(p, [a], [x])(torch.zeros(3)),
            r"a came with shape \(3,\); accepted is \(2,\)",
        ),
        (lambda p, a, x: CvxpyLayer(p, [a], [x])(), "got 0 tensors; accepted are 1, for the parameters a"),
        (lambda p, a, x: CvxpyLayer(p, [a], [x])(b=torch.zeros(2)), "and the names b"),
        (lambda p, a, x: CvxpyLayer(p, [a], [x])(np.zeros(2)), "a real floating-point torch.Tensor"),
        (lambda p, a, x: CvxpyLayer(p, [a], [x])(torch.zeros(2).long()), "dtype torch.int64"),
    ],
)
def test_bad_input(make: object, message: str) -> None:
    x, a = cp.Variable(2), cp.Parameter(2, name="a")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)))
    with pytest.raises(inv.ConditionsError, match=message):
        make(problem, a, x)


def test_batches_of_different_sizes() -> None:
    with pytest.raises(inv.ConditionsError, match=r"batch dims differ: centre \(4,\), radius \(3,\)"):
        box_projection()(torch.randn(4, 2, 3), torch.rand(3))


def test_complex_variables() -> None:
    z = cp.Variable(2, complex=True)
    with pytest.raises(inv.ConditionsError, match="complex; accepted are real ones"):
        CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(z))), [], [z])


@pytest.mark.parametrize("solver", ["PIQP", "DAQP", "ecos"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_any_solver_that_cvxpy_has_installed(solver: str) -> None:
    centre = torch.randn(2, 2, 3)
    (found,) = box_projection(solver=solver)(centre, torch.tensor(0.5))
    torch.testing.assert_close(found, centre.clamp(-0.5, 0.5), rtol=0, atol=1e-12)


def test_an_instance_of_a_solver() -> None:
    centre, solver = torch.randn(2, 2, 3), inv.get_solver("cvxpy.scs")
    (found,) = box_projection(solver=solver)(centre, torch.tensor(0.5))
    torch.testing.assert_close(found, centre.clamp(-0.5, 0.5), rtol=0, atol=1e-12)


def test_an_unknown_solver() -> None:
    with pytest.raises(inv.SolverNotFoundError, match=r"cvxpy\.simplex"):
        box_projection(solver="SIMPLEX")(torch.randn(2, 3), torch.tensor(0.5))
