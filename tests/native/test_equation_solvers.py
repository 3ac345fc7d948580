"""``torch.anderson`` and ``torch.broyden``: what they find, in how many evaluations, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core import Status

pytestmark = pytest.mark.usefixtures("float64")

SOLVERS = pytest.mark.parametrize("solver", ["torch.anderson", "torch.broyden"])


def contraction(y: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(y @ W.T) + b


def deep(size: int = 50, batch: int = 8, norm: float = 0.9) -> tuple[Tensor, Tensor]:
    W = torch.randn(size, size)
    return norm * W / torch.linalg.matrix_norm(W, 2), 0.3 * torch.randn(batch, size)


def solve(T: Any, y0: Tensor, *args: Tensor, solver: str, **options: Any) -> tuple[Tensor, inv.SolveInfo]:
    return inv.fixed_point(
        T, y0, args, solver=solver, options=options, on_failure="zero_grad", return_info=True
    )


@SOLVERS
def test_fixed_point_of_an_equilibrium_model(solver: str) -> None:
    W, b = deep(norm=0.97)
    W = (W + W.T) / 2
    y, info = solve(contraction, torch.zeros_like(b), W, b, solver=solver)
    expected = torch.zeros_like(b)
    for _ in range(2000):
        expected = contraction(expected, W, b)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    plain = solve(contraction, torch.zeros_like(b), W, b, solver="torch.anderson", memory=0)[1]
    assert int(info.iterations.max()) < 0.7 * int(plain.iterations.min())


@SOLVERS
def test_linear_systems_end_after_n_steps(solver: str) -> None:
    """Anderson with a full memory is GMRES on linear maps (Walker & Ni 2011), Broyden ends after 2n."""
    W, b = deep(6, 5)
    T = lambda y, W, b: y @ W.T + b  # noqa: E731
    y, info = solve(T, torch.zeros_like(b), W, b, solver=solver, memory=20, ftol=1e-10)
    expected = torch.linalg.solve(torch.eye(6) - W, b.T).T
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)
    assert int(info.iterations.max()) <= {"torch.anderson": 9, "torch.broyden": 14}[solver]


@SOLVERS
def test_where_plain_iteration_diverges(solver: str) -> None:
    """T′ = −3 at the fixed point: y ← T(y) runs away."""
    T = lambda y, a: a - 3 * torch.sin(y)  # noqa: E731
    a = torch.tensor([[0.5], [1.0]])
    y, info = solve(T, torch.zeros(2, 1), a, solver=solver)
    assert bool(info.ok.all())
    torch.testing.assert_close(T(y, a), y, rtol=1e-10, atol=1e-10)
    assert not solve(T, torch.zeros(2, 1), a, solver="torch.anderson", memory=0)[1].ok.any()


@SOLVERS
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_roots_whatever_the_sign_of_the_equations(solver: str, sign: float) -> None:
    f = lambda y, b: sign * (y + 0.3 * y.roll(1, -1) ** 3 - b)  # noqa: E731
    b = torch.randn(6, 3)
    y = inv.root(f, torch.zeros(6, 3), b, solver=solver)
    torch.testing.assert_close(f(y, b), torch.zeros(6, 3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_broyden_does_not_mind_the_units_of_the_equations(scale: float) -> None:
    """Its updates are the same whatever J is multiplied by (the test of convergence is not)."""
    f = lambda y: scale * torch.stack([10 * (y[..., 1] - y[..., 0] ** 2), 1 - y[..., 0]], -1)  # noqa: E731
    y = inv.root(f, torch.tensor([-1.2, 1.0]), solver="torch.broyden", options={"ftol": 1e-12 * scale})
    torch.testing.assert_close(y, torch.ones(2), rtol=1e-9, atol=0)


def test_broyden_takes_one_jacobian_for_many_steps() -> None:
    calls = []

    def jacobian(y: Tensor, a: Tensor) -> Tensor:
        calls.append(1)
        return torch.diag_embed(3 * y**2)

    a = torch.tensor([[2.0, 3.0]])
    _, info = inv.root(
        lambda y, a: y**3 - a,
        torch.ones(1, 2),
        a,
        jacobian=jacobian,
        solver="torch.broyden",
        return_info=True,
    )
    assert len(calls) == 1
    assert int(info.iterations) > 4
    calls.clear()
    inv.root(
        lambda y, a: y**3 - a, torch.ones(1, 2), a, jacobian=jacobian, solver="torch.broyden",
        options={"jacobian": "identity"},
    )  # fmt: skip
    assert not calls


def test_broyden_start_with_a_singular_jacobian() -> None:
    y = inv.root(lambda y: y**3 + y**2 - 2, torch.zeros(2, 1), solver="torch.broyden")
    torch.testing.assert_close(y, torch.ones(2, 1), rtol=1e-10, atol=0)


# --- one batch, many paths ------------------------------------------------------------------------------


@SOLVERS
def test_each_sample_goes_as_if_alone(solver: str) -> None:
    """Easy, without a root, far away, NaN: elementwise, so that rounding is the same everywhere."""
    f = lambda y, a: y**3 + y * a - 1  # noqa: E731
    a = torch.tensor([[1.0], [2.0], [torch.nan], [30.0], [0.1]])
    start = torch.tensor([[0.5], [5.0], [0.0], [-3.0], [1.0]])
    run = lambda rows: inv.root(  # noqa: E731
        f, start[rows], a[rows], solver=solver, on_failure="zero_grad", return_info=True
    )
    together, info = run(slice(None))
    assert [status is Status.CONVERGED for status in info.status] == [True, True, False, True, True]
    for i in range(5):
        alone, of_one = run(slice(i, i + 1))
        assert torch.equal(together[i].nan_to_num(9.0), alone[0].nan_to_num(9.0))
        assert int(info.iterations[i]) == int(of_one.iterations[0])


@SOLVERS
def test_how_often_it_is_asked_does_not_matter(solver: str) -> None:
    W, b = deep(10, 5)
    first = solve(contraction, torch.zeros_like(b), W, b, solver=solver)
    for every in (3, 10, 1000):
        again = solve(contraction, torch.zeros_like(b), W, b, solver=solver, check_every=every, maxiter=60)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1].iterations, again[1].iterations)


@SOLVERS
def test_no_root_is_given_up(solver: str) -> None:
    _, info = inv.root(
        lambda y: y**2 + 1, torch.full((1, 1), 0.7), solver=solver, on_failure="nan", return_info=True
    )
    assert info.status[0] is Status.NOT_CONVERGED
    assert int(info.iterations) < 200


@SOLVERS
def test_unknown_option_is_named(solver: str) -> None:
    with pytest.raises(TypeError, match=rf"{solver}: unknown options \['tol'\]; accepted are \['"):
        inv.root(lambda y: y - 1, torch.zeros(1), solver=solver, options={"tol": 1})
