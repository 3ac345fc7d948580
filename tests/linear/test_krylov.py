"""Matrix-free Krylov methods: the solves themselves, and the adjoint that uses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.linear.lu import lu_factor
from invlayer_core.structure import SystemShape

METHODS = [inv.linear.GMRES(), inv.linear.GMRES(restart=8), inv.linear.BiCGStab(), inv.linear.CG()]
FLOAT = torch.float64


def matrices(count: int, n: int, dtype: torch.dtype, *, symmetric: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    a = torch.eye(n, dtype=dtype) + 0.4 * torch.randn(count, n, n, generator=generator, dtype=dtype) / n**0.5
    return a @ a.mT + torch.eye(n, dtype=dtype) if symmetric else a


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_solves_what_lu_solves(method: inv.linear.Krylov, dtype: torch.dtype) -> None:
    a = matrices(5, 30, dtype, symmetric=isinstance(method, inv.linear.CG))
    rhs = torch.randn(5, 30, generator=torch.Generator().manual_seed(2), dtype=dtype)
    solution = method.solve(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), rhs)
    exact = torch.linalg.lu_solve(*lu_factor(a)[:2], rhs.unsqueeze(-1)).squeeze(-1)
    loose = 100 * method.tolerance(dtype)
    torch.testing.assert_close(solution.x, exact, rtol=loose, atol=loose)
    measured = (rhs - (a @ solution.x.unsqueeze(-1)).squeeze(-1)).norm(dim=-1) / rhs.norm(dim=-1)
    torch.testing.assert_close(solution.residual, measured, rtol=1e-3, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_zero_right_hand_side_and_an_identity_do_not_divide_by_zero(method: inv.linear.Krylov) -> None:
    rhs = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=FLOAT)
    solution = method.solve(lambda v: v, rhs)
    torch.testing.assert_close(solution.x, rhs, rtol=1e-14, atol=0)
    assert torch.equal(solution.residual[0], torch.tensor(0.0, dtype=FLOAT))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_singular_system_is_told_by_the_measured_residual(method: inv.linear.Krylov) -> None:
    rhs = torch.ones(2, 3, dtype=FLOAT)
    diagonal = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 4.0]], dtype=FLOAT)
    solution = method.solve(lambda v: diagonal * v, rhs)
    assert not solution.residual[0] <= 0.1  # CG may even leave it NaN
    assert solution.residual[1] < 1e-10


def symmetric_problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    half = 0.2 * torch.randn(4, 4, generator=generator, dtype=FLOAT)
    a = half @ half.T + torch.eye(4, dtype=FLOAT)
    return a, torch.randn(3, 4, generator=generator, dtype=FLOAT), torch.zeros(3, 4, dtype=FLOAT)


def conditions(y: Tensor, a: Tensor, t: Tensor) -> Tensor:
    return y @ a + 0.1 * y**3 - t


def layer(method: inv.linear.LinearSolver, a: Tensor, t: Tensor) -> Tensor:
    start = torch.zeros_like(t)
    result: Tensor = inv.root(conditions, start, (a, t), adjoint=inv.adjoints.Implicit(linear_solver=method))
    return result


@pytest.mark.parametrize("method", METHODS[::2] + METHODS[3:], ids=str)
def test_gradcheck_to_second_order(method: inv.linear.Krylov) -> None:
    a, t, _ = symmetric_problem()
    inputs = (a.requires_grad_(), t.requires_grad_())
    layer_of = lambda a, t: layer(method, (a + a.T) / 2, t)  # noqa: E731
    assert torch.autograd.gradcheck(layer_of, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer_of, inputs)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "transform",
    [grad, jacrev, jacfwd, hessian, lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))],
    ids=["grad", "jacrev", "jacfwd", "hessian", "jacrev(jacfwd)", "jacfwd(jacfwd)"],
)
def test_torch_func_equals_lu(method: inv.linear.Krylov, transform) -> None:  # type: ignore[no-untyped-def]
    a, t, _ = symmetric_problem()
    ours = transform(lambda t: layer(method, a, t).pow(2).sum())(t)
    exact = transform(lambda t: layer(inv.linear.LU(), a, t).pow(2).sum())(t)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)


def test_nested_reverse_transforms() -> None:
    a, t, _ = symmetric_problem()
    ours = jacrev(jacrev(lambda t: layer(inv.linear.GMRES(), a, t).pow(2).sum()))(t)
    exact = hessian(lambda t: layer(inv.linear.LU(), a, t).pow(2).sum())(t)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_vmap_of_grad() -> None:
    a, t, _ = symmetric_problem()
    value = lambda t: layer(inv.linear.GMRES(), a, t).pow(2).sum()  # noqa: E731
    torch.testing.assert_close(vmap(grad(value))(t), torch.stack([grad(value)(row) for row in t]))


def test_no_jacobian_is_formed() -> None:
    """n = 20 000 unknowns per sample: one dense block alone would take 3 GiB."""
    n = 20_000
    t = torch.linspace(0.1, 1.0, n, dtype=FLOAT).requires_grad_()

    @inv.implicit_function(
        conditions=lambda y, t: y + 0.1 * torch.sin(y) + 0.05 * torch.roll(y, 1) - t,
        adjoint=inv.adjoints.Implicit(linear_solver=inv.linear.GMRES()),
    )
    def solve(t: Tensor) -> Tensor:
        y = torch.zeros_like(t)
        for _ in range(200):
            y = t - 0.1 * torch.sin(y) - 0.05 * torch.roll(y, 1)
        return y

    (ours,) = torch.autograd.grad(solve(t).sum(), t)
    unrolled = solve.__wrapped__(t)  # type: ignore[attr-defined]
    (exact,) = torch.autograd.grad(unrolled.sum(), t)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=0)


def test_auto_takes_lu_up_to_a_gibibyte_of_blocks() -> None:
    auto = inv.adjoints.Implicit()
    shape = SystemShape
    small, large = (shape(torch.Size((8,)), torch.Size((n,))) for n in (100, 10_000))
    assert isinstance(auto.method(small, FLOAT), inv.linear.LU)
    assert isinstance(auto.method(large, FLOAT), inv.linear.GMRES)


@pytest.mark.parametrize("singular", ["nan", "zero", "raise"])
def test_a_singular_sample_does_not_reach_the_others(singular: str) -> None:
    t = torch.tensor([[0.0], [4.0]], dtype=FLOAT, requires_grad=True)
    solve = inv.implicit_function(
        conditions=lambda y, t: y**2 - t,
        adjoint=inv.adjoints.Implicit(singular=singular, linear_solver=inv.linear.GMRES()),  # type: ignore[arg-type]
    )(torch.sqrt)
    y = solve(t)
    if singular == "raise":
        with pytest.raises(inv.SingularJacobianError, match=r"GMRES.*sample 0 \(relative residual"):
            torch.autograd.grad(y.sum(), t)
        return
    (gradient,) = torch.autograd.grad(y.sum(), t)
    assert gradient[1] == 0.25
    assert gradient[0].isnan() if singular == "nan" else gradient[0] == 0


def test_failed_samples_get_their_own_answer() -> None:
    t = torch.tensor([[-1.0], [4.0]], dtype=FLOAT, requires_grad=True)
    y = inv.root(
        lambda y, t: y**2 - t, torch.ones(2, 1, dtype=FLOAT), t, on_failure="zero_grad",
        adjoint=inv.adjoints.Implicit(linear_solver=inv.linear.GMRES()),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(y.sum(), t)
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [0.25]], dtype=FLOAT))


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(inv.ConditionsError, match=r"singular='lstsq', linear_solver=GMRES.*take LU"):
        inv.adjoints.Implicit(singular="lstsq", linear_solver=inv.linear.GMRES())
    with pytest.raises(inv.ConditionsError, match=r"linear_solver='gmres'.*an instance from inv.linear"):
        inv.adjoints.Implicit(linear_solver="gmres")  # type: ignore[arg-type]


def contraction(y: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """T with ‖T′‖ < 0.8 for the a below: not symmetric, and not linear."""
    return 0.3 * torch.tanh(y @ a.T) + t


def equilibrium(a: Tensor, t: Tensor, method: inv.linear.LinearSolver) -> Tensor:
    adjoint = inv.adjoints.Implicit(linear_solver=method)
    result: Tensor = inv.fixed_point(contraction, torch.zeros_like(t), (a, t), adjoint=adjoint)
    return result


def neumann_problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(3, 3, generator=generator, dtype=FLOAT).requires_grad_(),
        torch.randn(2, 3, generator=generator, dtype=FLOAT).requires_grad_(),
    )


def test_neumann_to_second_order() -> None:
    """Finite differences, and an unrolled iteration."""
    method = inv.linear.Neumann(rtol=1e-14)
    a, t = neumann_problem()
    layer_of = lambda a, t: equilibrium(a, t, method)  # noqa: E731
    assert torch.autograd.gradcheck(layer_of, (a, t), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer_of, (a, t))
    y = torch.zeros_like(t)
    for _ in range(100):
        y = contraction(y, a, t)
    weights = torch.linspace(-1.0, 1.0, 6, dtype=FLOAT).reshape(2, 3)
    ours = torch.autograd.grad((equilibrium(a, t, method) * weights).sum(), (a, t))
    unrolled = torch.autograd.grad((y * weights).sum(), (a, t))
    torch.testing.assert_close(ours, unrolled, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian, lambda f: vmap(grad(f))])
def test_neumann_under_torch_func(transform) -> None:  # type: ignore[no-untyped-def]
    a, t = (tensor.detach() for tensor in neumann_problem())
    ours, exact = (
        transform(lambda t, method=method: equilibrium(a, t, method).pow(2).sum())(t)
        for method in (inv.linear.Neumann(rtol=1e-14), inv.linear.LU())
    )
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


def test_neumann_where_nothing_contracts() -> None:
    """y = 3y − t has the fixed point t/2, and a series that diverges: an error, no number."""
    t = torch.ones(2, 1, dtype=FLOAT, requires_grad=True)
    y = inv.fixed_point(
        lambda y, t: 3 * y - t, torch.zeros(2, 1, dtype=FLOAT), t,
        adjoint=inv.adjoints.Implicit(linear_solver=inv.linear.Neumann()),
    )  # fmt: skip
    with pytest.raises(
        inv.SingularJacobianError, match=r"Neumann.*did not solve.*sample 0.*take linear_solver"
    ):
        y.sum().backward()


def test_neumann_stops_at_divergence_of_one_sample_but_goes_on_for_the_others() -> None:
    slopes = torch.tensor([[3.0], [0.99]], dtype=FLOAT)
    rhs = torch.ones(2, 1, dtype=FLOAT)
    solution = inv.linear.Neumann(maxiter=5000).solve(lambda v: slopes * v - v, rhs)
    assert not solution.residual[0] < 1
    torch.testing.assert_close(solution.x[1], 1 / (slopes[1] - 1), rtol=1e-8, atol=0)
    assert 1000 < solution.products < 5000


def test_gmres_ends_a_space_once_every_sample_is_solved() -> None:
    a = matrices(3, 60, FLOAT, symmetric=False)
    rhs = torch.ones(3, 60, dtype=FLOAT)
    product = lambda v: (a @ v.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    often, seldom = (
        inv.linear.GMRES(rtol=1e-6, restart=60, check_every=every).solve(product, rhs) for every in (1, 60)
    )
    assert often.products < seldom.products
    assert often.residual.max() <= 1e-6
