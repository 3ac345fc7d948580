"""Cholesky, Lstsq and Auto: the dense solvers beside LU, and the choice between dense and matrix-free.

The problem: the minimiser of a strictly convex energy, so that J is symmetric positive definite; its solver
is NumPy's Newton, which torch cannot see into.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.opaque import gauss_jordan, numpy_newton
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.adjoints import Implicit
from invlayer_core.structure import SystemShape

FLOAT = torch.float64


def convex_problem(batch: int = 3, n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    half = torch.randn(n, n, generator=generator, dtype=FLOAT)
    a = half @ half.T / n + torch.eye(n, dtype=FLOAT)
    return a.requires_grad_(), torch.randn(batch, n, generator=generator, dtype=FLOAT).requires_grad_()


def gradient(y: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """Of ½ yᵀ(A + Aᵀ)y/2 + Σ y⁴/4 − tᵀy."""
    return y @ (a + a.T) / 2 + y**3 - t


@inv.from_numpy
def minimiser(a: np.ndarray, t: np.ndarray) -> np.ndarray:
    symmetric, n = (a + a.T) / 2, a.shape[0]
    return numpy_newton(
        lambda y: y @ symmetric + y**3 - t,
        lambda y: symmetric + 3 * (y * y)[..., None] * np.eye(n),
        np.zeros_like(t),
    )


def layer(method: Any, **settings: Any) -> Any:
    return inv.implicit_function(gradient, adjoint=Implicit(linear_solver=method), **settings)(minimiser)


def analytic(a: Tensor, t: Tensor, y: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (a + a.T) / 2 + 3 * torch.diag_embed(y * y)
    w = gauss_jordan(blocks.detach(), cotangent)
    outer = w.mT @ y.detach()
    return -(outer + outer.T) / 2, w


METHODS = [inv.linear.Cholesky(), inv.linear.Lstsq(), inv.linear.LU(), inv.linear.Auto()]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_first_derivatives_against_the_analytic_ones(method: inv.linear.LinearSolver) -> None:
    a, t = convex_problem()
    y = layer(method)(a, t)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=FLOAT).reshape(y.shape)
    ours = torch.autograd.grad(y, (a, t), cotangent)
    torch.testing.assert_close(ours, analytic(a, t, y, cotangent), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_second_derivatives_against_finite_differences(method: inv.linear.LinearSolver) -> None:
    inputs = convex_problem(batch=2, n=3)
    assert torch.autograd.gradcheck(layer(method), inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer(method), inputs)


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
@pytest.mark.parametrize(
    "transform",
    [jacrev, jacfwd, hessian, lambda f: jacrev(jacrev(f)), lambda f: vmap(jacrev(f))],
    ids=["jacrev", "jacfwd", "hessian", "jacrev(jacrev)", "vmap(jacrev)"],
)
def test_torch_func_equals_lu(method: inv.linear.LinearSolver, transform: Any) -> None:
    a, t = (tensor.detach() for tensor in convex_problem())
    ours, exact = (
        transform(lambda t, solver=solver: layer(solver)(a, t).pow(2).sum())(t)
        for solver in (method, inv.linear.LU())
    )
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


def test_cholesky_is_what_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No LU is taken where J is what Cholesky needs."""
    a, t = convex_problem()
    y = layer(inv.linear.Cholesky())(a, t)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("LU was called")

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", refuse)
    torch.autograd.grad(y.sum(), (a, t))


@pytest.mark.parametrize("skew", [0.5, 0.0], ids=["not symmetric", "not definite"])
def test_cholesky_of_another_matrix_is_noticed_and_said(skew: float) -> None:
    matrix = torch.tensor(
        [[1.0, 2.0 + skew], [2.0, 1.0]] if not skew else [[2.0, 1.0 + skew], [1.0, 2.0]], dtype=FLOAT
    )
    t = torch.tensor([[1.0, 0.3], [0.2, -1.0]], dtype=FLOAT, requires_grad=True)
    solve = inv.implicit_function(
        lambda y, t: y @ matrix.T - t, adjoint=Implicit(linear_solver=inv.linear.Cholesky())
    )(lambda t: torch.linalg.solve(matrix, t.T).T)
    y = solve(t)
    with pytest.warns(inv.PerformanceWarning, match=r"Cholesky\(\) did not solve.*LU took its place"):
        (ours,) = torch.autograd.grad(y[:, 0].sum(), t)
    exact = torch.linalg.inv(matrix)[0].expand(2, 2)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-14)


def test_lstsq_answers_redundant_equations() -> None:
    """y₁ + y₂ = t, twice: the change of least norm moves both alike, by the pseudo-inverse of J."""
    t = torch.tensor([[1.0], [3.0]], dtype=FLOAT, requires_grad=True)

    def twice(y: Tensor, t: Tensor) -> Tensor:
        total = y.sum(-1, keepdim=True) - t
        return torch.cat([total, 2 * total], -1)

    def solve(adjoint: Implicit) -> Any:
        halves = inv.from_numpy(lambda t: np.repeat(t / 2, 2, axis=-1))
        return inv.implicit_function(twice, adjoint=adjoint)(halves)

    (ours,) = torch.autograd.grad(solve(Implicit(linear_solver=inv.linear.Lstsq()))(t)[:, 0].sum(), t)
    torch.testing.assert_close(ours, torch.full_like(t, 0.5), rtol=1e-14, atol=0)
    with pytest.raises(inv.SingularJacobianError):
        solve(Implicit())(t).sum().backward()


def test_lstsq_takes_other_numbers_of_equations() -> None:
    """One equation for two unknowns: J⁺ = Jᵀ(JJᵀ)⁻¹."""
    t = torch.tensor([2.0], dtype=FLOAT, requires_grad=True)
    adjoint = Implicit(linear_solver=inv.linear.Lstsq())
    solve = inv.implicit_function(lambda y, t: (y[..., :1] * 3 + y[..., 1:] * 4) - t, adjoint=adjoint)
    y = solve(lambda t: torch.cat([t * 3, t * 4]) / 25)(t)
    (ours,) = torch.autograd.grad(y, t, torch.tensor([1.0, 10.0], dtype=FLOAT))
    torch.testing.assert_close(ours, torch.tensor([43 / 25], dtype=FLOAT), rtol=1e-14, atol=0)


def test_lstsq_has_no_rule_under_nested_forward_mode() -> None:
    a, t = (tensor.detach() for tensor in convex_problem())
    with pytest.raises(inv.UnsupportedTransformError, match=r"least-squares derivatives.*jacfwd of\s+jacrev"):
        jacfwd(jacfwd(lambda t: layer(inv.linear.Lstsq())(a, t).sum()))(t)


@pytest.mark.parametrize("singular", ["damped", "nan", "zero"])
def test_lstsq_leaves_nothing_to_a_policy(singular: str) -> None:
    with pytest.raises(inv.ConditionsError, match=r"Lstsq has an answer for every sample"):
        Implicit(singular=singular, linear_solver=inv.linear.Lstsq())  # type: ignore[arg-type]


def test_a_failed_sample_leaves_the_others_bitwise_alone() -> None:
    a, t = convex_problem()
    bad = t.detach().clone()
    bad[1] = torch.nan
    bad.requires_grad_()
    for method in METHODS[:2]:
        y = layer(method, on_failure="zero_grad")(a, bad)
        (ours,) = torch.autograd.grad(y[[0, 2]].sum(), bad)
        (exact,) = torch.autograd.grad(layer(inv.linear.LU())(a, t)[[0, 2]].sum(), t)
        torch.testing.assert_close(ours[[0, 2]], exact[[0, 2]], rtol=1e-13, atol=1e-14)
        assert torch.equal(ours[1], torch.zeros(4, dtype=FLOAT))


def test_auto_is_lu_up_to_its_limit() -> None:
    shape = SystemShape(torch.Size((8,)), torch.Size((100,)))
    assert inv.linear.Auto().choose(shape, FLOAT) == inv.linear.LU()
    assert inv.linear.Auto(dense_limit=1000).choose(shape, FLOAT) == inv.linear.GMRES()
    assert inv.linear.Auto().choose(shape, torch.float32) == inv.linear.LU()


@pytest.mark.parametrize(
    ("adjoint", "told"),
    [
        (Implicit(), "LU() (auto: the blocks of 3 systems of 4 unknowns take 384 bytes)"),
        (
            Implicit(linear_solver=inv.linear.Auto(dense_limit=100)),
            "GMRES(rtol=None, maxiter=500, restart=40, check_every=4, preconditioner=None) (auto: the blocks "
            "of 3 systems of 4 unknowns take 384 bytes, more than 100 bytes)",
        ),
        (Implicit(linear_solver=inv.linear.Cholesky()), "Cholesky()"),
    ],
    ids=["auto", "beyond the limit", "asked for"],
)
def test_info_says_what_was_chosen_and_why(adjoint: Implicit, told: str) -> None:
    a, t = convex_problem()
    _, info = inv.implicit_function(gradient, adjoint=adjoint, return_info=True)(minimiser)(a, t)
    assert info.linear_solver == told
