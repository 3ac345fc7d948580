"""Preconditioned Krylov methods: fewer steps on ill-conditioned systems, and the same derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.conditions.system import SparseJacobian, System
from invlayer_core.jacobians import SparsityPattern
from invlayer_core.jacobians.diagonal import jacobian_diagonal
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.linear.lu import lu_factor
from invlayer_core.linear.matrix_free import LinearResidual
from invlayer_core.structure import Arguments, SystemShape

pytestmark = pytest.mark.usefixtures("float64")

N = 24
GENERATOR = torch.Generator().manual_seed(0)
SCALES = torch.logspace(0, 3, N, dtype=torch.float64)  # the units of the equations
COUPLING = 0.1 * torch.randn(N, N, generator=GENERATOR, dtype=torch.float64) / N**0.5
COUPLING = COUPLING * (torch.rand(N, N, generator=GENERATOR) < 0.3)
THETA = torch.randn(2, N, generator=GENERATOR, dtype=torch.float64)
KINDS = [inv.linear.GMRES, inv.linear.BiCGStab]


def scaled(y: Tensor, theta: Tensor) -> Tensor:
    """Regular but for the units of the equations, which make its condition number 1e3; not symmetric."""
    return SCALES * (y + 0.1 * y**3 + y @ COUPLING.T - theta)


def symmetric(y: Tensor, theta: Tensor) -> Tensor:
    """The gradient of a strictly convex function of badly scaled variables."""
    return SCALES * (y + 0.1 * y**3 - theta) + y @ (COUPLING + COUPLING.T)


def analytic(y: Tensor, _theta: Tensor) -> Tensor:
    return SCALES.unsqueeze(-1) * (torch.diag_embed(1 + 0.3 * y**2) + COUPLING)


def by_units(r: Tensor, _y: Tensor, _theta: Tensor) -> Tensor:
    """Not symmetric, so that a transpose that is forgotten shows."""
    return (r / SCALES) - 0.8 * (r / SCALES) @ COUPLING.T


def solve(theta: Tensor, method: Any, f: Callable[..., Tensor] = scaled, **keywords: Any) -> Tensor:
    adjoint = inv.adjoints.Implicit(linear_solver=method)
    result: Tensor = inv.root(f, torch.zeros_like(theta), theta, adjoint=adjoint, **keywords)
    return result


def gradient(method: Any, f: Callable[..., Tensor] = scaled, **keywords: Any) -> Tensor:
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(solve(theta, method, f, **keywords).pow(2).sum(), theta)[0]


# --- fewer steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, inv.linear.CG])
def test_an_ill_conditioned_system_takes_few_products(kind: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    half = 0.1 * torch.randn(3, N, N, generator=generator, dtype=torch.float64) / N**0.5
    a = torch.eye(N) + half + half.mT
    a = SCALES.sqrt().unsqueeze(-1) * a * SCALES.sqrt()  # symmetric positive definite, condition about 1e3
    rhs = torch.randn(3, N, generator=generator, dtype=torch.float64)
    product = lambda v: (a @ v.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    method = kind(check_every=1)
    plain, helped = method.solve(product, rhs), method.solve(product, rhs, lambda v: v / diagonal)
    assert helped.products <= 0.6 * plain.products
    assert helped.residual.max() <= 10 * method.tolerance(torch.float64)
    exact = torch.linalg.lu_solve(*lu_factor(a)[:2], rhs.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(helped.x * diagonal, exact * diagonal, rtol=1e-8, atol=1e-8)
    measured = (rhs - product(helped.x)).norm(dim=-1) / rhs.norm(dim=-1)
    torch.testing.assert_close(helped.residual, measured, rtol=0.1, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preconditioner", ["jacobi", by_units])
def test_what_fails_without_is_solved_with_one(kind: Any, preconditioner: Any) -> None:
    with pytest.raises(inv.SingularJacobianError, match=r"did not solve.*or a preconditioner="):
        gradient(kind(maxiter=12))
    ours = gradient(kind(maxiter=12, preconditioner=preconditioner))
    torch.testing.assert_close(ours, gradient(inv.linear.LU()), rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_with_the_diagonal() -> None:
    with pytest.raises(inv.SingularJacobianError, match=r"CG.*did not solve"):
        gradient(inv.linear.CG(maxiter=12), symmetric)
    ours = gradient(inv.linear.CG(maxiter=12, preconditioner="jacobi"), symmetric)
    torch.testing.assert_close(ours, gradient(inv.linear.LU(), symmetric), rtol=1e-9, atol=1e-9)


# --- derivatives ------------------------------------------------------------------------------------------

PRECONDITIONERS = {"jacobi": "jacobi", "callable": by_units}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_finite_differences_to_second_order(kind: Any, name: str) -> None:
    method = kind(rtol=1e-12, maxiter=60, preconditioner=PRECONDITIONERS[name])
    theta = THETA[:1].clone().requires_grad_()
    layer = lambda t: solve(t, method)  # noqa: E731
    assert torch.autograd.gradcheck(layer, (theta,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, (theta,))


TRANSFORMS: dict[str, Any] = {
    "grad": grad, "jacrev": jacrev, "jacfwd": jacfwd, "hessian": hessian,
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)), "vmap(grad)": lambda f: vmap(grad(f)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_equals_lu(name: str, transform: str) -> None:
    """With so few steps that no derivative is had without the preconditioner, or without its transpose."""
    limited = inv.linear.GMRES(rtol=1e-12, maxiter=20, preconditioner=PRECONDITIONERS[name])
    ours, exact = (
        TRANSFORMS[transform](lambda t, m=method: solve(t, m).pow(2).sum())(THETA)
        for method in (limited, inv.linear.LU())
    )
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_system_of_a_linear_solve_has_the_same_one(transposed: bool, transpose: bool) -> None:
    """Its Jacobian is A = J or Jᵀ, so that the transposes of A and of J are not the same."""
    shape = SystemShape(THETA.shape[:1], THETA.shape[1:])
    system = System(scaled, Arguments.flatten((THETA,)), shape)
    residual = LinearResidual(system, transposed, None)
    point = (THETA, 2 * THETA, THETA)  # b, y, θ
    inner = linearize(System(residual, Arguments.flatten(point), shape), THETA, point)
    method = inv.linear.GMRES(preconditioner=by_units).of_inner_system(system, transposed)
    ours = method.prepare(inner, transpose=transpose)
    assert ours is not None
    inverse = by_units(torch.eye(N), THETA, THETA).T
    inverse = inverse.T if transpose != transposed else inverse
    torch.testing.assert_close(ours(THETA), THETA @ inverse.T, rtol=1e-13, atol=1e-13)


def test_third_order() -> None:
    limited = inv.linear.GMRES(rtol=1e-12, maxiter=20, preconditioner=by_units)

    def third(method: Any) -> Tensor:
        derivative = theta = THETA[:1].clone().requires_grad_()
        derivative = solve(theta, method).pow(2).sum()
        for _ in range(3):
            (grown,) = torch.autograd.grad(derivative, theta, create_graph=True)
            derivative = grown.pow(2).sum()
        return grown.detach()

    torch.testing.assert_close(third(limited), third(inv.linear.LU()), rtol=1e-8, atol=1e-8)


def test_one_with_a_transpose_of_its_own() -> None:
    """NumPy inside: torch sees nothing of it, and need not."""

    class Opaque:
        def __call__(self, r: Tensor, _y: Tensor, _theta: Tensor) -> Tensor:
            return torch.from_numpy((r / SCALES).numpy() - 0.8 * (r / SCALES).numpy() @ COUPLING.numpy().T)

        def transposed(self, r: Tensor, _y: Tensor, _theta: Tensor) -> Tensor:
            return torch.from_numpy((r - 0.8 * r @ COUPLING).numpy() / SCALES.numpy())

    ours = gradient(inv.linear.GMRES(maxiter=12, preconditioner=Opaque()))
    torch.testing.assert_close(ours, gradient(inv.linear.LU()), rtol=1e-9, atol=1e-9)


def test_failed_samples_get_their_own_answer() -> None:
    theta = THETA.clone().requires_grad_()

    def never(y0: Tensor, t: Tensor) -> Tensor:
        y = solve(t, inv.linear.LU()).detach().clone()
        y[0] = torch.nan
        return y

    y = solve(
        theta, inv.linear.GMRES(maxiter=12, preconditioner="jacobi"), solver=never, on_failure="zero_grad"
    )
    (ours,) = torch.autograd.grad(y[1].pow(2).sum(), theta)
    assert torch.equal(ours[0], torch.zeros(N))
    torch.testing.assert_close(ours[1], gradient(inv.linear.LU())[1], rtol=1e-9, atol=1e-9)


# --- the diagonal -----------------------------------------------------------------------------------------


class Entries(SparseJacobian):
    """The entries of the analytic Jacobian, and none of its blocks."""

    def __init__(self) -> None:
        full = SparsityPattern.of((COUPLING != 0) | torch.eye(N, dtype=torch.bool))
        self.places = (full.rows, full.cols)

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        raise AssertionError("the blocks are not needed")

    def entries(self, y: Tensor, *args: Any) -> Tensor:
        return analytic(y, *args)[:, *self.places]


PATTERN = (COUPLING != 0) | torch.eye(N, dtype=torch.bool)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(
    ("jacobian", "pattern"),
    [(None, None), (analytic, None), (Entries(), None), (None, PATTERN)],
    ids=["row by row", "blocks", "entries", "by colours"],
)
def test_every_way_to_the_diagonal(jacobian: Any, pattern: Any, chunk_size: int | None) -> None:
    shape = SystemShape(THETA.shape[:1], THETA.shape[1:])
    arguments = Arguments.flatten((THETA,))
    system = System(scaled, arguments, shape, jacobian=jacobian, chunk_size=chunk_size)
    pattern = None if pattern is None else SparsityPattern.of(pattern)
    ours = jacobian_diagonal(linearize(system, 2 * THETA, [THETA]), pattern)
    exact = analytic(2 * THETA, THETA).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(ours, exact, rtol=1e-14, atol=0)


def test_the_pattern_of_one_system_as_a_setting() -> None:
    method = inv.linear.GMRES(maxiter=12, preconditioner=inv.linear.Jacobi(PATTERN))
    torch.testing.assert_close(gradient(method), gradient(inv.linear.LU()), rtol=1e-9, atol=1e-9)


def test_zeros_on_the_diagonal_are_left_alone() -> None:
    turned = lambda y, t: torch.stack([y[..., 1] - t[..., 0], -y[..., 0] + 3 * y[..., 1] ** 3], -1)  # noqa: E731
    theta = torch.tensor([[0.5, 0.0]], requires_grad=True)
    method = inv.linear.GMRES(preconditioner="jacobi")
    solution = torch.tensor([[0.375, 0.5]])
    y = solve(theta, method, turned, solver=lambda y0, t: solution)
    (ours,) = torch.autograd.grad(y.sum(), theta)
    torch.testing.assert_close(ours, torch.tensor([[1 + 9 * 0.25, 0.0]]), rtol=1e-12, atol=1e-12)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, inv.linear.CG])
@pytest.mark.parametrize("wrong", ["ilu", 3.0])
def test_what_is_no_preconditioner(kind: Any, wrong: Any) -> None:
    with pytest.raises(
        inv.ConditionsError,
        match=rf"{kind.__name__}\(preconditioner={wrong!r}\): accepted are 'jacobi'.*callable",
    ):
        kind(preconditioner=wrong)


def test_one_that_torch_cannot_transpose() -> None:
    opaque = lambda r, y, t: (r / SCALES).detach()  # noqa: E731
    with pytest.raises(inv.ConditionsError, match=r"torch does not see.*attribute transposed"):
        gradient(inv.linear.GMRES(preconditioner=opaque))


@pytest.mark.parametrize(
    ("result", "came"), [(lambda r, y, t: r[:, :3], r"shape \(2, 3\)"), (lambda r, y, t: 1.0, "float")]
)
def test_one_that_returns_something_else(result: Any, came: str) -> None:
    with pytest.raises(inv.ConditionsError, match=rf"preconditioner=.*returned {came} for 48 numbers"):
        gradient(inv.linear.GMRES(preconditioner=result))


def test_a_pattern_that_does_not_fit() -> None:
    method = inv.linear.GMRES(preconditioner=inv.linear.Jacobi(torch.eye(3, dtype=torch.bool)))
    with pytest.raises(inv.ConditionsError, match=r"24 equations for 24 unknowns and SparsityPattern\(3 x 3"):
        gradient(method)
