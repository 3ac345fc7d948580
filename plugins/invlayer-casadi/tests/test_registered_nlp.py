"""``casadi.ipopt`` and ``casadi.sqpmethod`` on objectives and constraints in torch."""

import math

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

F64 = torch.float64
SOLVERS = pytest.mark.parametrize("solver", ["casadi.ipopt", "casadi.sqpmethod"])


def objective(y: Tensor, p: Tensor) -> Tensor:
    """That of Hock & Schittkowski 71."""
    return y[..., 0] * y[..., 3] * y[..., :3].sum(-1) + y[..., 2] * p[..., 0]


def product(y: Tensor, p: Tensor) -> Tensor:
    return y.prod(-1, keepdim=True) - 25


def sphere(y: Tensor, p: Tensor) -> Tensor:
    return (y * y).sum(-1, keepdim=True) - 40 - p[..., 1:]


@SOLVERS
def test_hock_schittkowski_71_in_torch(solver: str) -> None:
    p = torch.tensor([[1.0, 0.0], [1.1, 0.1]], dtype=F64, requires_grad=True)
    start = torch.tensor([1.0, 4.7, 3.8, 1.4], dtype=F64).expand(2, 4)

    def solve(p: Tensor):
        return inv.nlp(
            objective, start, p, eq=sphere, ineq=product, bounds=(1.0, 5.0), solver=solver,
            return_multipliers=True,
        )  # fmt: skip

    with torch.no_grad():
        y, multipliers = solve(p)
    expected = [1.0, 4.7429996418092970, 3.8211499817883077, 1.3794082897556986]
    torch.testing.assert_close(y[0], torch.tensor(expected, dtype=F64), rtol=1e-8, atol=0)
    assert float(multipliers.inequalities[0]) == pytest.approx(0.5522936589, rel=1e-7)
    assert float(multipliers.lower[0, 0]) == pytest.approx(1.0878712, rel=1e-6)
    assert torch.autograd.gradcheck(lambda p: solve(p)[0], p, atol=1e-6)


@SOLVERS
def test_unconstrained_minimisation(solver: str) -> None:
    a = torch.tensor([[3.0, 2.0], [0.5, 1.5]], dtype=F64, requires_grad=True)
    y, info = inv.minimize(
        lambda y, a: (y.exp() - a * y).sum(-1), torch.zeros_like(a), a, solver=solver, return_info=True,
        polish="auto",
    )  # fmt: skip
    torch.testing.assert_close(y, a.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], 1 / a.detach(), rtol=1e-8, atol=0)
    assert (info.iterations > 0).all()
    assert set(info.message) == {"Solve_Succeeded"}


@SOLVERS
def test_a_bad_sample_leaves_the_others_untouched(solver: str) -> None:
    def solve(p: Tensor):
        return inv.nlp(
            lambda y, p: ((y - p) ** 2).sum(-1), torch.zeros(8, 2, dtype=F64), p,
            ineq=lambda y, p: 1 - y.sum(-1, keepdim=True), solver=solver, on_failure="nan", return_info=True,
        )  # fmt: skip

    p = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * 2
    healthy, _ = solve(p)
    p[3, 0] = math.nan
    y, info = solve(p.requires_grad_())
    assert [bool(ok) for ok in info.ok] == [i != 3 for i in range(8)]
    others = torch.arange(8) != 3
    assert torch.equal(y[others], healthy[others])


@SOLVERS
@pytest.mark.parametrize("batch", ["serial", "threads", "lockstep"])
def test_every_way_to_run_a_batch_gives_the_same(solver: str, batch: str) -> None:
    """In lockstep F waits for the other samples; nothing may be locked meanwhile."""
    p = torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = inv.nlp(
        lambda y, p: ((y - p) ** 2).sum(-1), torch.zeros(6, 2, dtype=F64), p, solver=solver, batch=batch,
        ineq=lambda y, p: 0.5 - y.sum(-1, keepdim=True), eq=lambda y, p: y[..., :1] * p[..., 1:] - 0.1,
        bounds=(-1.0, 1.0),
    )  # fmt: skip
    torch.testing.assert_close(y[:, 0], 0.1 / p[:, 1], rtol=1e-10, atol=0)
    torch.testing.assert_close(
        y[:, 1], torch.minimum(p[:, 1], 0.5 - y[:, 0]).clamp(-1, 1), rtol=1e-9, atol=1e-9
    )


@SOLVERS
def test_unknown_options_and_exceptions(solver: str) -> None:
    start = torch.ones(2, dtype=F64)
    with pytest.raises((TypeError, inv.ConvergenceError), match=rf"{solver}: unknown options .'maxiter'"):
        inv.minimize(lambda y: (y * y).sum(-1), start, solver=solver, options={"maxiter": 3})

    def picky(y: Tensor) -> Tensor:
        if y.isfinite().all() and y[0] != 1:
            raise ArithmeticError("no connection to the data base")
        return (y**2).sum(-1)

    with pytest.raises(inv.ConvergenceError, match="ArithmeticError: no connection to the data base"):
        inv.minimize(picky, start, solver=solver)


@SOLVERS
def test_samples_take_turns(solver: str) -> None:
    """CasADi's functions are built under a lock, which no sample may hold while it asks for a value."""
    p = torch.tensor([[1.0, 0.0], [1.1, 0.1], [0.9, 0.2], [1.2, 0.0], [1.0, 0.3]], dtype=F64)
    start = torch.tensor([1.0, 4.7, 3.8, 1.4], dtype=F64).expand(5, 4)
    solve = lambda batch: inv.nlp(  # noqa: E731
        objective, start, p, eq=sphere, ineq=product, bounds=(1.0, 5.0), solver=solver, batch=batch
    )
    assert torch.equal(solve("lockstep"), solve("serial"))
