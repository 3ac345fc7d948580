"""What may come in, in which shape, dtype and place; what never changes; what it costs."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")


def f(y: Tensor, a: Tensor) -> Tensor:
    """y³ + y = a, elementwise."""
    return y**3 + y - a


def slope(y: Tensor) -> Tensor:
    """dy/da."""
    return 1 / (3 * y.detach() ** 2 + 1)


def newton(y0: Tensor, a: Tensor) -> Tensor:
    """A plain torch solver of f, for any shapes."""
    y = y0 + 0 * a
    for _ in range(40):
        y = y - f(y, a) / (3 * y**2 + 1)
    return y


# --- shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "event_dims"),
    [
        ((), 0), ((1,), 1), ((3,), 0), ((3,), 1), ((2, 3), 0), ((2, 3), 1), ((2, 3), 2),
        ((2, 3, 4), 1), ((2, 3, 4), 2), ((2, 3, 4), 3), ((1, 1, 1), 1), ((2, 0), 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("solver", ["torch.newton", newton], ids=["native", "callable"])
def test_event_and_batch_dims(shape: tuple[int, ...], event_dims: int, solver: Any) -> None:
    a = torch.rand(shape, requires_grad=True)
    y, info = inv.root(f, torch.zeros(shape), args=a, event_dims=event_dims, solver=solver, return_info=True)
    batch = torch.Size(shape[: len(shape) - event_dims])
    assert y.shape == a.shape
    assert info.ok.shape == info.residual.shape == info.iterations.shape == batch
    assert len(info.status) == len(info.message) == batch.numel()
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, slope(y))


def test_event_dims_decide_what_is_one_system() -> None:
    """A matrix equation y + yyᵀ/9 = a couples the whole matrix: two event dims, or an error."""
    coupled = lambda y, a: y + y @ y.mT / 9 - a  # noqa: E731
    a = torch.rand(2, 3, 3, requires_grad=True)
    y = inv.root(coupled, torch.zeros(2, 3, 3), args=a, event_dims=2)
    (ours,) = torch.autograd.grad(y.pow(2).sum(), a)
    dense = torch.func.vmap(torch.func.jacrev(lambda y: y + y @ y.mT / 9))(y.detach()).reshape(2, 9, 9)
    expected = torch.linalg.solve(dense.mT, 2 * y.detach().reshape(2, 9, 1)).reshape(2, 3, 3)
    torch.testing.assert_close(ours, expected)
    with pytest.raises(inv.ConditionsError, match=r"mix the samples of the batch \(2, 3\)"):
        inv.root(coupled, torch.zeros(2, 3, 3), args=a, solver=lambda y0, a: y.detach()).sum().backward()


def test_more_event_dims_than_dims() -> None:
    with pytest.raises(inv.ConditionsError, match=r"y has shape \(2,\), with fewer dims than event_dims=3"):
        inv.root(f, torch.zeros(2), args=torch.ones(2), event_dims=3)


@pytest.mark.parametrize("event_dims", [-1, 1.0, "1"])
def test_event_dims_is_a_count(event_dims: Any) -> None:
    with pytest.raises(inv.ConditionsError, match=r"event_dims=.*: accepted is an integer >= 0"):
        inv.root(f, torch.zeros(2), args=torch.ones(2), event_dims=event_dims)


@pytest.mark.parametrize("solver", ["torch.newton", newton], ids=["native", "callable"])
def test_batched_args_need_a_batched_guess(solver: Any) -> None:
    y0 = torch.zeros(2)
    with pytest.raises(
        inv.ConditionsError,
        match=r"as many equations as unknowns|newton returned y of shape \(5, 2\); accepted .* \(2,\)",
    ):
        inv.root(f, y0, args=torch.rand(5, 2, requires_grad=True), solver=solver)


def test_guess_of_another_batch_than_the_args() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        inv.root(f, torch.zeros(3, 2), args=torch.rand(5, 2))


def test_conditions_of_a_wrong_batch_say_what_to_do() -> None:
    message = r"returned shape \(1, 2\) for y of shape \(3, 2\), whose batch dims are \(3,\)(?s:.*)y0.expand"
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(lambda y: y[:1] - 1, torch.zeros(3, 2))


def test_fewer_equations_than_unknowns() -> None:
    with pytest.raises(inv.ConditionsError, match=r"torch.newton needs as many equations as unknowns"):
        inv.root(lambda y: y[..., :1] - 1, torch.zeros(3, 2))


@pytest.mark.parametrize("shared", [False, True], ids=["batched", "shared"])
@pytest.mark.parametrize("solver", ["torch.newton", newton], ids=["native", "callable"])
def test_as_many_samples_as_unknowns(shared: bool, solver: Any) -> None:
    """B = n is where shapes would be guessed wrong, if they were guessed."""
    n = 3
    a = torch.rand(n) if shared else torch.rand(n, n)
    a.requires_grad_()
    y = inv.root(f, torch.zeros(n, n), args=a, solver=solver)
    weight = torch.arange(1.0, n * n + 1).reshape(n, n)
    (gradient,) = torch.autograd.grad((weight * y).sum(), a)
    expected = weight * slope(y)
    torch.testing.assert_close(gradient, expected.sum(0) if shared else expected)


def test_column_of_args() -> None:
    """(n, 1) and (1, n) args in a batch of n: broadcast as f itself does."""
    n = 3
    column, row = torch.rand(n, 1, requires_grad=True), torch.rand(1, n, requires_grad=True)
    y = inv.root(lambda y, c, r: f(y, c * r), torch.zeros(n, n), args=(column, row))
    grads = torch.autograd.grad(y.sum(), (column, row))
    table = slope(y)
    torch.testing.assert_close(grads[0], (table * row).sum(1, keepdim=True).detach())
    torch.testing.assert_close(grads[1], (table * column).sum(0, keepdim=True).detach())


@pytest.mark.parametrize(
    "solver",
    ["torch.newton", newton, pytest.param("scipy.root", marks=pytest.mark.plugin("invlayer-scipy"))],
    ids=["native", "callable", "per-sample"],
)
def test_empty_batch(solver: Any) -> None:
    a = torch.rand(0, 2, requires_grad=True)
    shared = torch.ones(2, requires_grad=True)
    y, info = inv.root(
        lambda y, a, s: f(y, a * s),
        torch.zeros(0, 2),
        args=(a, shared),
        solver=solver if isinstance(solver, str) else lambda y0, a, s: y0,
        return_info=True,
    )
    assert y.shape == (0, 2)
    assert info.status == ()
    of_a, of_shared = torch.autograd.grad(y.sum(), (a, shared))
    assert of_a.shape == (0, 2)
    assert torch.equal(of_shared, torch.zeros(2))


def test_systems_without_unknowns() -> None:
    a = torch.rand(3, 0, requires_grad=True)
    y = inv.root(f, torch.zeros(3, 0), args=a)
    assert y.shape == (3, 0)


def test_samples_may_share_args_but_not_unknowns() -> None:
    """F of one sample may hold the args of another: the pullback to args is of the whole batch."""
    a = torch.rand(3, 2, requires_grad=True)
    layer = lambda a: inv.root(lambda y, a: f(y, a + a.mean(0) * a.roll(1, 0)), torch.zeros(3, 2), args=a)  # noqa: E731
    assert torch.autograd.gradcheck(layer, a, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, a)


# --- y0 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y0", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"y0 has dtype torch\.int64; .*Use y0\.double\(\)"),
        (torch.zeros(2, dtype=torch.bool), r"y0 has dtype torch\.bool"),
        (np.zeros(2), r"y0 is a ndarray; .*torch\.as_tensor\(y0"),
        ([0.0, 0.0], r"y0\[0\] is a float"),
        (0.0, "y0 is a float"),
        (None, "y0 is a NoneType"),
    ],
    ids=["integer", "bool", "NumPy", "list", "float", "None"],
)
@pytest.mark.parametrize("kind", [inv.root, inv.fixed_point])
def test_guess_has_to_be_a_real_tensor(kind: Any, y0: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=f"{kind.__name__}: {message}"):
        kind(lambda y: y, y0)


@pytest.mark.parametrize(
    ("x", "message"), [(np.zeros(2), "x is a ndarray"), (torch.zeros(2).long(), r"x has dtype torch\.int64")]
)
def test_inverse_checks_x(x: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=f"inverse: {message}"):
        inv.inverse(x, torch.asin, f=torch.sin)


def test_no_gradient_flows_to_the_guess() -> None:
    y0, a = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = inv.root(f, y0, args=a)
    assert torch.autograd.grad(y.sum(), (y0, a), allow_unused=True)[0] is None
    assert torch.equal(torch.func.grad(lambda y0: inv.root(f, y0, args=a.detach()).sum())(y0), torch.zeros(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["y0", "args"])
def test_bad_numbers_come_back_as_an_error(bad: float, where: str) -> None:
    y0, a = torch.zeros(2, 2), torch.ones(2, 2)
    (y0 if where == "y0" else a)[1, 0] = bad
    with pytest.raises(inv.ConvergenceError, match=r"1 of 2 samples(?s:.*)sample 1: NOT_FINITE"):
        inv.root(f, y0, args=a)


# --- args -----------------------------------------------------------------------------------------------


def test_args_are_any_pytree() -> None:
    a, b = torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True)

    def conditions(y: Tensor, tree: Any, mode: str, flag: Any) -> Tensor:
        assert (mode, flag) == ("cubic", None)
        return y**3 + tree["p"][0] * y - tree["q"][0][1]

    def layer(a: Tensor, b: Tensor) -> Tensor:
        return inv.root(conditions, torch.zeros(2), args=({"p": [a, 3], "q": ((1.5, b),)}, "cubic", None))

    assert torch.autograd.gradcheck(layer, (a, b), check_forward_ad=True, check_batched_grad=True)


def test_one_tensor_stands_for_a_tuple_of_one() -> None:
    a = torch.rand(2)
    assert torch.equal(inv.root(f, torch.zeros(2), args=a), inv.root(f, torch.zeros(2), args=(a,)))


def test_integer_and_boolean_tensors_among_the_args() -> None:
    power, mask, a = torch.tensor([3, 5]), torch.tensor([True, False]), torch.rand(2, requires_grad=True)
    conditions = lambda y, a, k, m: torch.where(m, y**k, y**3) + y - a  # noqa: E731
    layer = lambda a: inv.root(conditions, torch.zeros(2), args=(a, power, mask))  # noqa: E731
    assert torch.autograd.gradcheck(layer, a, check_forward_ad=True, check_batched_grad=True)
    torch.testing.assert_close(
        torch.func.jacfwd(torch.func.jacrev(layer))(a.detach()),
        torch.func.jacrev(torch.func.jacrev(layer))(a.detach()),
    )


def test_unused_arg_gets_no_gradient_or_zero() -> None:
    a, unused = torch.rand(2, requires_grad=True), torch.rand(3, requires_grad=True)
    y = inv.root(lambda y, a, b: f(y, a), torch.zeros(2), args=(a, unused))
    _, gradient = torch.autograd.grad(y.sum(), (a, unused), allow_unused=True)
    assert gradient is None or torch.equal(gradient, torch.zeros(3))


def test_same_tensor_twice() -> None:
    a = torch.rand(2, requires_grad=True)
    y = inv.root(lambda y, p, q: f(y, p * q), torch.zeros(2), args=(a, a))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], 2 * a.detach() * slope(y))


@pytest.mark.parametrize(
    "call",
    [
        lambda **kw: inv.root(f, torch.zeros(2), args=torch.ones(2), **kw),
        lambda **kw: inv.fixed_point(torch.cos, torch.zeros(2), **kw),
        lambda **kw: inv.inverse(torch.zeros(2), torch.asin, f=torch.sin, **kw),
        lambda **kw: inv.implicit_function(conditions=f, **kw),
        lambda **kw: inv.RootLayer(f, **kw)(torch.ones(2), y0=torch.zeros(2)),
    ],
    ids=["root", "fixed_point", "inverse", "implicit_function", "RootLayer"],
)
def test_unknown_keyword(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"unknown keywords tolerance, verbose; accepted besides.*atol.*rtol"):
        call(tolerance=1e-6, verbose=True)


@pytest.mark.parametrize("jacobian", [1, "exact"])
def test_adjoint_has_to_be_an_adjoint(jacobian: Any) -> None:
    with pytest.raises(inv.ConditionsError, match=r"adjoint=.*: accepted is an instance from inv.adjoints"):
        inv.root(f, torch.zeros(2), args=torch.ones(2), adjoint=jacobian)


@pytest.mark.parametrize("options", [[1], "maxiter", 3])
def test_options_have_to_be_a_mapping(options: Any) -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"options=.*: accepted is a mapping, such as \{'maxiter': 50\}"
    ):
        inv.root(f, torch.zeros(2), args=torch.ones(2), options=options)


def test_solver_is_found_by_name_or_the_error_lists_names() -> None:
    with pytest.raises(inv.SolverNotFoundError, match=r"torch\.newton"):
        inv.root(f, torch.zeros(2), args=torch.ones(2), solver="torch.newtn")


def test_options_go_with_registered_solvers_alone() -> None:
    with pytest.raises(inv.ConditionsError, match=r"a plain callable(?s:.*)functools.partial"):
        inv.root(f, torch.zeros(2), args=torch.ones(2), solver=newton, options={"maxiter": 3})


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (lambda y: y.detach().numpy(), "returned ndarray; accepted is one torch.Tensor"),
        (lambda y: (y, y), "returned tuple"),
        (lambda y: None, "returned NoneType"),
        (lambda y: y > 0, r"returned dtype torch\.bool; accepted is a real floating-point"),
        (lambda y: y * 1j, r"returned dtype torch\.complex128"),
    ],
    ids=["NumPy", "tuple", "None", "bool", "complex"],
)
def test_conditions_have_to_return_a_real_tensor(residual: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(residual, torch.zeros(2), solver=lambda y0: y0)


# --- devices and dtypes ---------------------------------------------------------------------------------


def test_mixed_devices_are_named() -> None:
    args = (torch.ones(2), torch.ones(2, device="meta"))
    message = r"y0 is on cpu but tensor 1 of args \(shape \(2,\)\) is on meta; .*\.to\('cpu'\)"
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(lambda y, a, b: y - a - b, torch.zeros(2), args=args)


def test_scalar_on_the_host_goes_with_every_device() -> None:
    """As in torch itself: a 0-d CPU tensor may meet a tensor on another device."""
    with pytest.raises(Exception, match=r"meta|Meta") as caught:  # meta tensors cannot be solved for
        inv.root(f, torch.zeros(2, device="meta"), args=torch.tensor(1.0))
    assert not isinstance(caught.value, inv.ConditionsError)


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("solver", ["torch.newton", newton], ids=["native", "callable"])
def test_dtype_in_is_dtype_out(dtype: torch.dtype, solver: Any) -> None:
    """Half precision is solved in float32; value and gradient come back as what went in."""
    seen = []

    def conditions(y: Tensor, a: Tensor) -> Tensor:
        seen.append((y.dtype, a.dtype))
        return f(y, a)

    a = torch.tensor([[0.5, 2.0]], dtype=dtype, requires_grad=True)
    y = inv.root(conditions, torch.zeros(1, 2, dtype=dtype), args=a, solver=solver)
    y.sum().backward()
    assert y.dtype == a.grad.dtype == dtype
    inside = torch.float32 if dtype.itemsize == 2 else dtype
    assert set(seen) == {(inside, inside)}
    exact = newton(torch.zeros(1, 2), a.detach().double())
    torch.testing.assert_close(y.double(), exact, rtol=TOLERANCES[dtype], atol=0)
    torch.testing.assert_close(a.grad.double(), slope(exact), rtol=4 * TOLERANCES[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inverse_and_implicit_function_keep_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.25, 0.5]], dtype=dtype, requires_grad=True)
    asin = inv.implicit_function(conditions=lambda y, x: torch.sin(y) - x)(torch.asin)
    for y in (inv.inverse(x, torch.asin, f=torch.sin), asin(x)):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == gradient.dtype == dtype


def test_guess_in_single_precision_with_args_in_double() -> None:
    """torch.zeros is float32 by default, data often is not: y is what y0 is, gradients are what args are."""
    a = torch.tensor([0.5, 2.0], requires_grad=True)
    y = inv.root(f, torch.zeros(2, dtype=torch.float32), args=a)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert (y.dtype, gradient.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(gradient, slope(y.double()), rtol=1e-6, atol=0)


def test_guess_in_double_precision_with_args_in_single() -> None:
    a = torch.tensor([0.5, 2.0], dtype=torch.float32, requires_grad=True)
    y = inv.root(f, torch.zeros(2), args=a)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert (y.dtype, gradient.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(gradient.double(), slope(y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("of_g", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_x", [torch.float32, torch.float64], ids=str)
def test_solver_of_another_dtype(of_g: torch.dtype, of_x: torch.dtype) -> None:
    """A library in single precision behind data in double, and the other way round."""
    x = torch.tensor([[0.25, 0.5, 0.1]], dtype=of_x, requires_grad=True)
    y = inv.inverse(x, lambda x: torch.asin(x.to(of_g)), f=torch.sin, atol=1e-3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == of_x
    torch.testing.assert_close(gradient.double(), (1 - x.detach().double() ** 2) ** -0.5, rtol=1e-6, atol=0)


def test_autocast_inside_f() -> None:
    """Under autocast the layer gives the very numbers that it gives without."""
    linear, a = nn.Linear(2, 2).float(), torch.ones(1, 2, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = inv.root(lambda y, a: y + linear(y).tanh() / 8 - a, torch.zeros_like(a), args=a)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    exact = inv.root(lambda y, a: y + linear(y).tanh() / 8 - a, torch.zeros_like(a), args=a)
    (expected,) = torch.autograd.grad(exact.sum(), a)
    assert y.dtype == torch.float32
    assert torch.equal(y, exact)
    assert torch.equal(gradient, expected)


# --- modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("polish", [0, "auto"])
def test_without_gradients(mode: Any, polish: Any) -> None:
    a = torch.tensor([[0.5, 2.0, 1.0]], requires_grad=True)
    with mode():
        y = inv.root(f, torch.zeros(1, 3), args=a, polish=polish)
        assert not y.requires_grad
    torch.testing.assert_close(y.clone(), newton(torch.zeros(1, 3), a.detach()))


def test_per_sample_solver_in_inference_mode() -> None:
    class ByJacobian(inv.Solver):
        def solve(self, problem: Any, y0: np.ndarray, options: Any) -> inv.SolverResult:
            for _ in range(30):
                y0 = y0 - np.linalg.solve(problem.jacobian(y0), problem.residual(y0))
            return inv.SolverResult(y=y0)

    with torch.inference_mode():
        y = inv.root(f, torch.zeros(2, 3), args=torch.ones(2, 3), solver=ByJacobian())
    torch.testing.assert_close(y.clone(), newton(torch.zeros(2, 3), torch.ones(2, 3)))


def test_threads_do_not_meddle() -> None:
    """The same layer, captured tensor and all, in four threads at once."""
    scale = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64, requires_grad=True)

    def work(load: float) -> tuple[Tensor, ...]:
        a = torch.full((4, 3), load, dtype=torch.float64, requires_grad=True)
        y = inv.root(lambda y, a: scale * y**3 + y - a, torch.zeros_like(a), args=a)
        first = torch.autograd.grad(y.pow(2).sum(), (a, scale), create_graph=True)
        return (y.detach(), *torch.autograd.grad(first[0].sin().sum() + first[1].sum(), (a, scale)))

    loads = [0.5 + 0.25 * i for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, loads))
    for ours, alone in zip(together, map(work, loads), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(ours, alone, strict=True))


def test_random_state_is_left_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = torch.ones(4, 3, requires_grad=True)
    torch.autograd.grad(inv.root(f, torch.zeros(4, 3), args=a, polish=1).sum(), a, create_graph=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


# --- NumPy functions ------------------------------------------------------------------------------------


def test_from_numpy_gives_float64_arrays_and_takes_any() -> None:
    seen = []

    def solver(y0: np.ndarray, a: np.ndarray, mode: str, mask: np.ndarray) -> Any:
        seen.append((y0.dtype, a.dtype, mode, mask.dtype))
        return newton(torch.from_numpy(y0), torch.from_numpy(a)).numpy().tolist()

    a = torch.tensor([[0.5, 2.0]], dtype=torch.float32, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    y = inv.root(
        lambda y, a, mode, mask: f(y, a), torch.zeros(1, 2, dtype=torch.float32), args=(a, "fast", mask),
        solver=inv.from_numpy(solver),
    )  # fmt: skip
    assert seen == [(np.float64, np.float64, "fast", np.bool_)]
    assert y.dtype == torch.float32
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], slope(y))


def overwriting(*arrays: np.ndarray) -> np.ndarray:
    """Solve f, then leave NaN in everything that was given."""
    y = newton(*map(torch.from_numpy, (np.zeros_like(arrays[-1]), arrays[-1].copy()))).numpy()
    for array in arrays:
        array[...] = np.nan
    return y


class Overwriting(inv.Solver):
    """A per-sample solver that leaves NaN in its guess, and in what the problem returned."""

    def solve(self, problem: Any, y0: np.ndarray, options: Any) -> inv.SolverResult:
        y = y0.copy()
        for _ in range(30):
            residual, jacobian = problem.residual(y), problem.jacobian(y)
            y -= np.linalg.solve(jacobian, residual)
            residual[...] = jacobian[...] = np.nan
        y0[...] = np.nan
        return inv.SolverResult(y=y)


class OverwritingBatch(inv.Solver):
    """A batched solver that leaves NaN in its guess."""

    batched = True

    def solve(self, problem: Any, y0: Tensor, options: Any) -> inv.SolverResult:
        y = y0.clone()
        for _ in range(30):
            y = y - torch.linalg.solve(problem.jacobian(y), problem.residual(y).unsqueeze(-1)).squeeze(-1)
        y0.fill_(torch.nan)
        return inv.SolverResult(y=y)


@pytest.mark.parametrize(
    "solver",
    [inv.from_numpy(overwriting), Overwriting(), OverwritingBatch()],
    ids=["callable", "serial", "batched"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_solver_that_overwrites_its_inputs(solver: Any, dtype: torch.dtype) -> None:
    y0 = torch.zeros(2, 2, dtype=dtype)
    a = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=dtype, requires_grad=True)
    kept = a.detach().clone()
    y = inv.root(f, y0, args=a, solver=solver)
    y.sum().backward()
    assert torch.equal(y0, torch.zeros(2, 2, dtype=dtype))
    assert torch.equal(a.detach(), kept)
    torch.testing.assert_close(a.grad, slope(y))


def test_inverse_by_a_function_that_overwrites_its_input() -> None:
    def g(x: np.ndarray) -> np.ndarray:
        return np.arcsin(x, out=x)

    x = torch.tensor([[0.25, 0.5]], requires_grad=True)
    inv.inverse(x, inv.from_numpy(g), f=torch.sin).sum().backward()
    assert torch.equal(x.detach(), torch.tensor([[0.25, 0.5]]))


def test_result_of_the_solver_may_change_later() -> None:
    """A solver that hands out its own work array, and reuses it in the next call."""
    work = torch.zeros(1, 2)

    def solver(y0: Tensor, a: Tensor) -> Tensor:
        return work.copy_(newton(y0, a))

    first = torch.tensor([[0.5, 2.0]], requires_grad=True)
    y = inv.root(f, torch.zeros(1, 2), args=first, solver=solver)
    kept = y.detach().clone()
    inv.root(f, torch.zeros(1, 2), args=torch.full((1, 2), 9.0), solver=solver)
    assert torch.equal(y.detach(), kept)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), first)[0], slope(kept))


def test_result_of_the_solver_may_change_later_without_gradients() -> None:
    work = torch.zeros(1, 2)
    solver = lambda y0, a: work.copy_(newton(y0, a))  # noqa: E731
    y = inv.root(f, torch.zeros(1, 2), args=torch.ones(1, 2), solver=solver)
    kept = y.clone()
    inv.root(f, torch.zeros(1, 2), args=torch.full((1, 2), 9.0), solver=solver)
    assert torch.equal(y, kept)


# --- implicit_function: y and aux -----------------------------------------------------------------------


def cube_root_with_aux(a: Tensor) -> tuple[Tensor, Tensor]:
    return a ** (1 / 3), 10 * a


def test_aux_comes_back_without_gradient() -> None:
    solve = inv.implicit_function(conditions=lambda y, a: y**3 - a)(cube_root_with_aux)
    a = torch.tensor([[1.0, 8.0]], requires_grad=True)
    y, aux = solve(a)
    assert torch.equal(aux, 10 * a.detach())
    assert not aux.requires_grad
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], 1 / (3 * y.detach() ** 2))


def test_aux_under_vmap_is_refused() -> None:
    solve = inv.implicit_function(conditions=lambda y, a: y**3 - a)(cube_root_with_aux)
    with pytest.raises(inv.UnsupportedTransformError, match="cannot hand out one aux for each slice"):
        torch.vmap(solve)(torch.tensor([[1.0, 8.0], [2.0, 3.0]]))


def test_decorated_function_keeps_its_name() -> None:
    solve = inv.implicit_function(conditions=f)(cube_root_with_aux)
    assert solve.__name__ == "cube_root_with_aux"


def test_info_of_a_decorated_function() -> None:
    solve = inv.implicit_function(conditions=lambda y, a: y**3 - a, return_info=True)(cube_root_with_aux)
    (_, _), info = solve(torch.tensor([[1.0, 8.0]]))
    assert bool(info.ok.all())
    assert info.solver == "cube_root_with_aux"


# --- cost -----------------------------------------------------------------------------------------------


class Counted:
    """Conditions that count their evaluations, and backward passes through them."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __call__(self, y: Tensor, a: Tensor) -> Tensor:
        self.forward += 1
        result = f(y, a)
        if result.requires_grad:
            result.register_hook(self._seen)
        return result

    def _seen(self, cotangent: Tensor) -> None:
        self.backward += 1


def test_no_jacobian_before_backward() -> None:
    a, conditions = torch.ones(2, 3, requires_grad=True), Counted()
    y = inv.root(conditions, torch.zeros(2, 3), args=a, solver=newton)
    assert (conditions.forward, conditions.backward) == (1, 0)
    y.sum().backward()
    assert conditions.forward == 2


def test_no_jacobian_without_gradients() -> None:
    conditions = Counted()
    with torch.no_grad():
        inv.root(conditions, torch.zeros(2, 3), args=torch.ones(2, 3, requires_grad=True), solver=newton)
    assert (conditions.forward, conditions.backward) == (1, 0)


def test_one_evaluation_per_backward_for_all_cotangents() -> None:
    a, conditions = torch.ones(1, 3, requires_grad=True), Counted()
    y = inv.root(conditions, torch.zeros(1, 3), args=a, solver=newton)
    torch.autograd.grad(y, a, torch.eye(3).unsqueeze(1), is_grads_batched=True)
    assert conditions.forward == 2


def live_tensors() -> int:
    # By type: isinstance() would wake up lazy objects that happen to lie about.
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def backward_once(layer: Callable[[Tensor], Tensor], a: Tensor) -> None:
    layer(a).sum().backward()


def backward_twice(layer: Callable[[Tensor], Tensor], a: Tensor) -> None:
    (first,) = torch.autograd.grad(layer(a).pow(2).sum(), a, create_graph=True)
    first.pow(2).sum().backward()


def graph_thrown_away(layer: Callable[[Tensor], Tensor], a: Tensor) -> None:
    torch.autograd.grad(layer(a).pow(2).sum(), a, create_graph=True)


def forward_only(layer: Callable[[Tensor], Tensor], a: Tensor) -> None:
    layer(a)


SCALE = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("use", [forward_only, backward_once, backward_twice, graph_thrown_away])
@pytest.mark.parametrize(
    "layer",
    [
        lambda a: inv.root(f, torch.zeros(2, 3), args=a),
        lambda a: inv.root(lambda y: SCALE * y**3 + y - a, torch.zeros(2, 3)),
        lambda a: inv.inverse(a / 4, inv.from_numpy(np.arcsin), f=torch.sin),
        lambda a: inv.root(f, torch.zeros(2, 3), args=a, solver=newton, polish=1, on_failure="zero_grad"),
    ],
    ids=["root", "captured", "inverse", "polished"],
)
def test_memory_is_flat(layer: Callable[[Tensor], Tensor], use: Callable[..., None]) -> None:
    a = torch.ones(2, 3, requires_grad=True)
    a.grad = torch.zeros_like(a)
    gc.collect()
    gc.disable()  # what only the cycle collector frees counts as a leak as well
    try:
        for _ in range(3):
            use(layer, a)
        before = live_tensors()
        for _ in range(100):
            use(layer, a)
        after = live_tensors()
    finally:
        gc.enable()
        SCALE.grad = None
    assert after <= before + 2


# --- layers ---------------------------------------------------------------------------------------------


LAYERS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "RootLayer": lambda: (
        inv.RootLayer(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), options={"maxiter": 50}),
        lambda layer: layer(y0=torch.zeros(1, 2)),
    ),
    "RootLayer of a function": lambda: (
        inv.RootLayer(f, polish=1, atol=1e-9),
        lambda layer: layer(torch.tensor([[0.5, 2.0]], requires_grad=True), y0=torch.zeros(1, 2)),
    ),
    "FixedPointLayer": lambda: (
        inv.FixedPointLayer(nn.Sequential(nn.Linear(2, 2), nn.Tanh())),
        lambda layer: layer(y0=torch.zeros(1, 2)),
    ),
    "InverseLayer": lambda: (
        inv.InverseLayer(inv.from_numpy(np.arcsin), f=torch.sin),
        lambda layer: layer(torch.tensor([[0.25, 0.5]], requires_grad=True)),
    ),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_layers_can_be_copied(make: Any, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer, use = make()
    use(layer).sum().backward()
    twin = duplicate(layer)
    assert torch.equal(use(twin), use(layer))
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert not set(map(id, twin.parameters())) & set(map(id, layer.parameters()))
    for parameter in twin.parameters():
        parameter.grad = None
    use(twin).sum().backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_have_a_state_dict_and_move(make: Any) -> None:
    layer, use = make()
    fresh, _ = make()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(use(fresh), use(layer))


def test_adjoint_and_error_types_can_be_pickled() -> None:
    adjoint = inv.adjoints.Implicit(singular="lstsq")
    assert pickle.loads(pickle.dumps(adjoint)) == adjoint
    with pytest.raises(inv.ConvergenceError) as caught:
        inv.root(lambda y: y**2 + 1, torch.ones(1), options={"maxiter": 5})
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
