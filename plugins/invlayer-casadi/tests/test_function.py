"""CasadiFunction: shapes, derivatives of every kind, errors, and Functions that call others."""

import copy
import pickle
import threading

import casadi as ca
import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi import CasadiFunction

F64 = torch.float64
BACKENDS = pytest.mark.parametrize("backend", ["casadi", "torch"])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def smooth() -> ca.Function:
    x, p = ca.SX.sym("x", 3), ca.SX.sym("p", 2)
    return ca.Function("smooth", [x, p], [x**2 * ca.sin(p[0]) + p[1] * ca.dot(x, x), ca.exp(p[0] * x[1])])


def smooth_in_torch(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    first = x**2 * torch.sin(p[..., :1]) + p[..., 1:] * (x * x).sum(-1, keepdim=True)
    return first, torch.exp(p[..., :1] * x[..., 1:2])


@BACKENDS
@pytest.mark.parametrize(
    ("x_batch", "p_batch"), [((), ()), ((5,), ()), ((5,), (5,)), ((4, 1), (3,)), ((0,), ())]
)
def test_values_and_first_derivatives(backend: str, x_batch: tuple, p_batch: tuple) -> None:
    f = CasadiFunction(smooth(), backend=backend)
    x, p = rand(*x_batch, 3).requires_grad_(), rand(*p_batch, 2, seed=1).requires_grad_()
    ours, theirs = f(x, p), smooth_in_torch(x, p)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-15, atol=1e-15)
    weights = [torch.randn_like(each) for each in ours]
    gradients = (torch.autograd.grad(each, (x, p), weights) for each in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-14, atol=1e-14)


@BACKENDS
def test_gradcheck_of_every_kind(backend: str) -> None:
    f = CasadiFunction(smooth(), backend=backend)
    inputs = rand(2, 3).requires_grad_(), rand(2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(f, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@BACKENDS
def test_torch_func(backend: str) -> None:
    f, x, p = CasadiFunction(smooth(), backend=backend), rand(4, 3), rand(2, seed=1)
    for transform in (
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda g: torch.func.jacrev(torch.func.jacrev(g)),
        lambda g: torch.func.jacrev(torch.func.jacfwd(g)),
        lambda g: torch.func.jacrev(torch.func.hessian(g)),  # third order
    ):
        mine = torch.vmap(transform(lambda x, p: f(x, p)[0]), in_dims=(0, None))(x, p)
        other = torch.vmap(transform(lambda x, p: smooth_in_torch(x, p)[0]), in_dims=(0, None))(x, p)
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)


def test_nested_forward_mode_raises() -> None:
    f, p = CasadiFunction(smooth()), rand(2)
    with pytest.raises(inv.UnsupportedTransformError, match=r"nested forward mode.*jacfwd of jacrev"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: f(x, p)[0]))(rand(3))


def test_the_conditions_of_a_root() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    f = CasadiFunction(
        ca.Function(
            "f", [x, p], [ca.vertcat(x[0] ** 3 + x[0] + x[1] - p[0], x[1] ** 3 + 2 * x[1] - x[0] * p[1])]
        )
    )

    def solve(p: Tensor) -> Tensor:
        return inv.root(f, torch.ones(3, 2, dtype=F64), p)

    p = (1 + rand(3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(solve, p, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, p)


@BACKENDS
def test_sparse_and_matrix_ports(backend: str) -> None:
    a = ca.SX.sym("a", ca.Sparsity.lower(3))
    b = ca.SX.sym("b", 3, 2)
    f = CasadiFunction(ca.Function("f", [a, b], [a @ b, a.T, ca.SX(2, 2)]), backend=backend)
    full, right = rand(4, 3, 3).requires_grad_(), rand(3, 2, seed=1).requires_grad_()
    product, transposed, nothing = f(full, right)
    torch.testing.assert_close(product, full.tril() @ right, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(transposed, full.tril().mT, rtol=0, atol=0)
    assert nothing.shape == (4, 2, 2)
    assert not nothing.any()
    (gradient,) = torch.autograd.grad(product.sum(), full)
    torch.testing.assert_close(gradient, (torch.ones(4, 3, 2, dtype=F64) @ right.mT).tril())
    assert torch.autograd.gradcheck(lambda *ab: f(*ab)[:2], (full, right))
    mapped = torch.vmap(lambda full: f(full, right)[0])(full)
    torch.testing.assert_close(mapped, product)


def test_dtypes() -> None:
    f = CasadiFunction(smooth())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        x, p = rand(2, 3).to(dtype).requires_grad_(), rand(2, seed=1).to(dtype)
        value = f(x, p)[0]
        assert value.dtype == dtype
        torch.testing.assert_close(
            value.double(), smooth_in_torch(x.double(), p.double())[0], rtol=tolerance, atol=tolerance
        )
        assert torch.autograd.grad(value.sum(), x)[0].dtype == dtype


def test_large_batches_go_to_torch_and_agree() -> None:
    f, x, p = CasadiFunction(smooth()), rand(5000, 3).requires_grad_(), rand(5000, 2, seed=1)
    assert (f.backend_for(1), f.backend_for(5000), f.backend_for(1, "cuda")) == ("casadi", "torch", "torch")
    theirs = CasadiFunction(smooth(), backend="casadi")(x, p)[0]
    ours = f(x, p)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    g, h = (torch.autograd.grad(value.square().sum(), x)[0] for value in (ours, theirs))
    torch.testing.assert_close(g, h, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda f: f(rand(3)), r"smooth came with 1 inputs; accepted are 2: i0, i1"),
        (lambda f: f(rand(4), rand(2)), r"'i0' came with shape \(4,\).*accepted is .*\(\*batch, 3\)"),
        (lambda f: f(rand(3), rand(2).long()), r"'i1' came with .*dtype torch.int64"),
        (lambda f: f(rand(2, 3), rand(5, 2)), r"batch dims that do not broadcast \(i0: \(2,\), i1: \(5,\)\)"),
        (lambda f: f(rand(3) + 1j, rand(2)), r"dtype torch.complex128"),
        (lambda f: f(rand(3).to("meta"), rand(2)), r"inputs on \['cpu', 'meta'\]; accepted is one device"),
        (
            lambda _: CasadiFunction(abs),
            r"CasadiFunction\(builtin_function_or_method\): accepted is a casadi",
        ),
        (
            lambda f: CasadiFunction(f.function, backend="cuda"),
            r"backend='cuda'.*accepted are 'auto', 'casadi'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(given, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        given(CasadiFunction(smooth()))


def test_numbers_stand_for_scalars() -> None:
    x, s = ca.SX.sym("x", 2), ca.SX.sym("s")
    f = CasadiFunction(ca.Function("f", [x, s], [x * s]))
    torch.testing.assert_close(f(torch.ones(2), 2.5), torch.full((2,), 2.5))


def test_copies_and_pickles() -> None:
    f = CasadiFunction(smooth(), backend="casadi")
    inputs = rand(2, 3), rand(2)
    f(*inputs)
    for twin in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert twin.backend == "casadi"
        assert torch.equal(twin(*inputs)[0], f(*inputs)[0])


# ---- Functions that are more than scalar operations


def interpolant() -> ca.Function:
    table = ca.interpolant("table", "bspline", [np.linspace(0, 3, 9)], np.sin(np.linspace(0, 3, 9)))
    x = ca.MX.sym("x", 2)
    return ca.Function("with_table", [x], [ca.vertcat(table(x[0]), x[1] * table(x[1]))])


def rootfinder(plugin: str = "newton") -> ca.Function:
    y, x = ca.SX.sym("y"), ca.SX.sym("x")
    solve = ca.rootfinder("solve", plugin, {"x": y, "p": x, "g": y**2 - x})
    z = ca.MX.sym("z", 2)
    return ca.Function("with_solver", [z], [ca.vertcat(solve(1, z[0]), z[1] * z[0])])


def linear_solve() -> ca.Function:
    a, b = ca.MX.sym("a", 3, 3), ca.MX.sym("b", 3)
    return ca.Function("linear", [a, b], [ca.solve(a, b)])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (interpolant, "calls another Function that is no expression"),
        (rootfinder, "calls another Function that is no expression"),
        (linear_solve, "cannot expand it"),
    ],
)
def test_what_has_no_translation_says_why(make, reason: str) -> None:
    f = CasadiFunction(make())
    assert reason in f.untranslatable
    assert f.backend_for(10**6) == "casadi"
    with pytest.raises(inv.ConditionsError, match="backend='torch' has no translation.*" + reason):
        CasadiFunction(make(), backend="torch").backend_for(1)


def test_what_has_a_translation_says_nothing() -> None:
    x = ca.MX.sym("x", 3)
    assert CasadiFunction(ca.Function("f", [x], [ca.norm_2(x)])).untranslatable is None


def test_leaving_another_device_is_a_warning() -> None:
    f = CasadiFunction(interpolant())
    with (
        pytest.warns(inv.PerformanceWarning, match=r"'with_table' is evaluated on the CPU, though .* meta"),
        pytest.raises(NotImplementedError),  # meta tensors hold nothing to copy
    ):
        f(torch.ones(2, dtype=F64, device="meta"))


def test_derivatives_through_an_interpolant_and_a_linear_solve() -> None:
    assert torch.autograd.gradcheck(CasadiFunction(interpolant()), (1 + rand(3, 2)).requires_grad_())
    assert torch.autograd.gradgradcheck(CasadiFunction(interpolant()), (1 + rand(3, 2)).requires_grad_())
    inputs = (
        (rand(2, 3, 3) + 3 * torch.eye(3, dtype=F64)).requires_grad_(),
        rand(2, 3, seed=1).requires_grad_(),
    )
    assert torch.autograd.gradcheck(CasadiFunction(linear_solve()), inputs)
    assert torch.autograd.gradgradcheck(CasadiFunction(linear_solve()), inputs)


def test_a_failing_solver_inside_makes_its_own_sample_nan() -> None:
    f = CasadiFunction(rootfinder("kinsol"))
    z = 1 + rand(5, 2)
    z[2, 0] = -1.0  # y² = −1 has no root, and kinsol raises
    with pytest.warns(inv.ConvergenceWarning, match=r"1 of 5 samples are NaN.*sample 2"):
        values = f(z)
    alone = torch.stack([f(row) for i, row in enumerate(z) if i != 2])
    assert values[2].isnan().all()
    assert torch.equal(values[[0, 1, 3, 4]], alone)


def test_threads_get_their_own_solver() -> None:
    f, z = CasadiFunction(rootfinder()), 1 + rand(25, 2)
    expected, wrong = f(z), []

    def work() -> None:
        for _ in range(8):
            wrong.extend([] if torch.equal(f(z), expected) else [1])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
