"""SuperLU behind SparseLU: a nonlinear Poisson equation, and what is special to SciPy."""

import copy
import pickle
import tracemalloc
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

import invlayer_core as inv
from invlayer_core.adjoints import Implicit
from invlayer_core.jacobians import SparsityPattern, detect_sparsity
from invlayer_core.linear import Factor, SparseLU

F64 = torch.float64


def conditions(y: Tensor, theta: Tensor, side: int) -> Tensor:
    """−Δy + y³ − θ on a side × side grid, zero on the border."""
    grid = y.reshape(*y.shape[:-1], side, side)
    p = torch.nn.functional.pad(grid, (1, 1, 1, 1))
    sums = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
    return (side + 1.0) ** 2 * (4 * grid - sums).reshape(y.shape) + y**3 - theta


def laplacian(side: int) -> sp.csc_matrix:
    line = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(side, side))
    return ((side + 1.0) ** 2 * (sp.kron(sp.eye(side), line) + sp.kron(line, sp.eye(side)))).tocsc()


def newton(side: int, theta: np.ndarray):
    """The solution and the factor of the last step, by NumPy and SciPy alone."""
    linear, y = laplacian(side), np.zeros(side**2)
    for _ in range(30):
        lu = splu((linear + sp.diags(3 * y**2)).tocsc())
        step = lu.solve(linear @ y + y**3 - theta)
        y = y - step
        if np.abs(step).max() < 1e-12:
            break
    return y, lu


def problem(side: int, *batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta = 100 * torch.randn(*batch, side**2, generator=generator, dtype=F64)
    return theta.requires_grad_(), torch.randn(*batch, side**2, generator=generator, dtype=F64)


def layer(side: int, theta: Tensor, method: SparseLU, *, hand_over: bool = False) -> Tensor:
    def solve(theta: Tensor):
        solved = [newton(side, row) for row in theta.reshape(-1, side**2).numpy()]
        y = torch.tensor(np.array([y for y, _ in solved])).reshape(theta.shape)
        factors = [Factor(lu.solve, lambda b, lu=lu: lu.solve(b, "T")) for _, lu in solved]
        return (y, factors) if hand_over else y

    f = partial(conditions, side=side)
    return inv.implicit_function(conditions=f, adjoint=Implicit(linear_solver=method))(solve)(theta)


def exact_gradient(side: int, theta: Tensor, cotangent: Tensor) -> Tensor:
    """J⁻ᵀ ȳ, refined, from the assembled matrix; ∂F/∂θ = −1."""
    rows = []
    for t, b in zip(
        theta.detach().reshape(-1, side**2).numpy(), cotangent.reshape(-1, side**2).numpy(), strict=True
    ):
        y, _ = newton(side, t)
        jacobian = (laplacian(side) + sp.diags(3 * y**2)).tocsc()
        lu = splu(jacobian)
        u = lu.solve(b, "T")
        rows.append(u + lu.solve(b - jacobian.T @ u, "T"))
    return torch.tensor(np.array(rows)).reshape(theta.shape)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("hand_over", [False, True], ids=["fresh factor", "factor handed over"])
@pytest.mark.parametrize(
    ("side", "batch"), [(32, ()), (24, (3,)), pytest.param(128, (), marks=pytest.mark.slow)]
)
def test_the_gradient_of_a_poisson_equation(side: int, batch: tuple[int, ...], hand_over: bool) -> None:
    theta, cotangent = problem(side, *batch)
    pattern = detect_sparsity(
        partial(conditions, side=side), torch.zeros(side**2, dtype=F64), theta[(0,) * len(batch)]
    )
    assert pattern.nnz == 5 * side**2 - 4 * side
    assert pattern.is_symmetric
    assert pattern.row_colouring.number <= 8
    y = layer(side, theta, SparseLU(pattern), hand_over=hand_over)
    (ours,) = torch.autograd.grad(y, theta, cotangent)
    assert relative(ours, exact_gradient(side, theta, cotangent)) < 1e-12


def test_the_gradient_of_a_poisson_equation_by_finite_differences() -> None:
    side = 40
    theta, cotangent = problem(side)
    pattern = detect_sparsity(partial(conditions, side=side), theta.detach(), theta)
    (ours,) = torch.autograd.grad(layer(side, theta, SparseLU(pattern)), theta, cotangent)
    direction = torch.randn(side**2, generator=torch.Generator().manual_seed(1), dtype=F64)
    ahead, behind = (newton(side, (theta.detach() + s * direction).numpy())[0] for s in (1e-2, -1e-2))
    difference = float(cotangent.numpy() @ (ahead - behind)) / 2e-2
    assert float(ours @ direction) == pytest.approx(difference, rel=1e-8)


def test_second_derivatives_of_a_poisson_equation() -> None:
    """∂²(cᵀy)/∂θ² v = −J⁻¹ (6 y u ∘ J⁻¹ v), with u = J⁻ᵀ c."""
    side = 20
    theta, c = problem(side)
    v = torch.randn(side**2, generator=torch.Generator().manual_seed(1), dtype=F64)
    pattern = detect_sparsity(partial(conditions, side=side), theta.detach(), theta)
    y = layer(side, theta, SparseLU(pattern))
    (first,) = torch.autograd.grad(y, theta, c, create_graph=True)
    (ours,) = torch.autograd.grad(first, theta, v)
    lu = splu((laplacian(side) + sp.diags(3 * y.detach().numpy() ** 2)).tocsc())
    exact = -lu.solve(6 * y.detach().numpy() * lu.solve(c.numpy(), "T") * lu.solve(v.numpy()), "T")
    assert relative(ours, torch.from_numpy(exact)) < 1e-12


def test_memory_stays_far_below_a_dense_jacobian() -> None:
    """n = 4096: a dense J has 16.8 million entries; no tensor made on the way has a tenth of that."""
    side = 64
    theta, cotangent = problem(side)
    y, _ = newton(side, theta.detach().numpy())
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, Tensor):
                    largest = max(largest, each.numel())
            return out

    f = partial(conditions, side=side)
    with Watch():
        pattern = detect_sparsity(f, torch.from_numpy(y), theta)
        solve = inv.implicit_function(conditions=f, adjoint=Implicit(linear_solver=SparseLU(pattern)))
        tracemalloc.start()
        torch.autograd.grad(solve(lambda theta: torch.from_numpy(y))(theta), theta, cotangent)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert largest < side**4 / 10
    assert traced < side**4 * 8 / 10


@pytest.mark.parametrize("name", ["scipy.splu", "SparseLU"])
def test_by_name_and_by_default(name: str) -> None:
    a = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0]], dtype=F64)
    t = torch.ones(2, 3, dtype=F64, requires_grad=True)
    method = name if name == "scipy.splu" else SparseLU()
    y = inv.root(
        lambda y, t: y @ a.T + y**3 - t, torch.zeros_like(t), t, adjoint=Implicit(linear_solver=method)
    )
    exact = inv.root(lambda y, t: y @ a.T + y**3 - t, torch.zeros_like(t), t)
    ours, lu = (torch.autograd.grad((each**2).sum(), t)[0] for each in (y, exact))
    torch.testing.assert_close(ours, lu, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permc_spec": "COLAMD"},
        {"permc_spec": "NATURAL", "diag_pivot_thresh": 0.1},
        {"options": {"SymmetricMode": True}, "diag_pivot_thresh": 0.0},
        {"relax": 4, "panel_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_options_change_the_way_and_not_the_result(options: dict, symmetric: bool) -> None:
    n = 40
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, n, generator=generator) < 0.1
    mask = mask | torch.eye(n).bool()
    mask = mask | mask.T if symmetric else mask
    a = torch.where(mask, torch.randn(n, n, generator=generator).double(), 0.0) + 4 * torch.eye(n, dtype=F64)
    t = torch.randn(n, generator=generator).double().requires_grad_()
    method = SparseLU(mask, options=options)
    f = lambda y, t: y @ a.T - t  # noqa: E731
    y = inv.root(f, torch.zeros(n, dtype=F64), t, adjoint=Implicit(linear_solver=method))
    (ours,) = torch.autograd.grad(y.sum(), t)
    torch.testing.assert_close(
        ours, torch.linalg.solve(a.T, torch.ones(n, dtype=F64)), rtol=1e-12, atol=1e-13
    )


def test_an_unknown_option_is_refused() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    y = inv.root(lambda y, t: y**3 - t, torch.ones(2, dtype=F64), t,
                 adjoint=Implicit(linear_solver=SparseLU(options={"fill": 2})))  # fmt: skip
    with pytest.raises(
        TypeError, match=r"scipy.splu: unknown option fill; accepted are permc_spec, diag_pivot"
    ):
        y.sum().backward()


def test_an_exactly_singular_matrix_is_its_samples_affair() -> None:
    t = torch.tensor([[4.0, 1.0], [0.0, 1.0], [9.0, 1.0]], dtype=F64, requires_grad=True)
    solve = inv.implicit_function(
        conditions=lambda y, t: y**2 - t,
        adjoint=Implicit(linear_solver=SparseLU(torch.eye(2).bool()), singular="zero"),
    )(torch.sqrt)
    (gradient,) = torch.autograd.grad(solve(t).sum(), t)
    exact = torch.tensor([[0.25, 0.5], [0.0, 0.0], [1 / 6, 0.5]], dtype=F64)
    torch.testing.assert_close(gradient, exact, rtol=1e-15, atol=0)


def test_settings_can_be_copied_and_pickled() -> None:
    settings = Implicit(linear_solver=SparseLU(torch.eye(3).bool(), options={"relax": 2}, rtol=1e-9))
    for twin in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert twin == settings
        assert hash(twin) == hash(settings)
        assert twin.linear_solver.pattern == SparsityPattern.of(torch.eye(3).bool())
