"""The least-squares solvers in torch, and ``torch.lbfgs``: fits, safeguards, samples on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core import Status

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ["torch.gauss_newton", "torch.levenberg_marquardt", "torch.dogleg", "torch.lbfgs"]
SOLVERS = pytest.mark.parametrize("solver", NAMES)
BY_MODEL = pytest.mark.parametrize("solver", NAMES[:3])

x = torch.linspace(0, 3, 50, dtype=torch.float64)


def decay(p: Tensor, data: Tensor) -> Tensor:
    a, b, c = p.unsqueeze(-1).unbind(-2)
    return a * torch.exp(-b * x) + c - data


def decay_jacobian(p: Tensor, data: Tensor) -> Tensor:
    slope = torch.exp(-p[..., 1:2] * x)
    return torch.stack([slope, -p[..., :1] * x * slope, torch.ones_like(slope)], -1)


def measured(noise: float = 0.05, batch: int = 6) -> Tensor:
    true = torch.tensor([2.0, 1.0, 0.5]) * (1 + 0.4 * torch.rand(batch, 3))
    return decay(true, torch.zeros(batch, 50)) + noise * torch.randn(batch, 50)


def fit(f: Any, y0: Tensor, *args: Tensor, solver: str, **keywords: Any) -> tuple[Tensor, inv.SolveInfo]:
    keywords = {"on_failure": "zero_grad", "return_info": True, **keywords}
    return inv.least_squares(f, y0, args, solver=solver, **keywords)


@SOLVERS
def test_fit_is_stationary(solver: str) -> None:
    data = measured()
    p, info = fit(decay, torch.ones(6, 3), data, solver=solver)
    assert bool(info.ok.all())
    assert float(info.residual.max()) < 1e-6
    reference = fit(decay, torch.ones(6, 3), data, solver=NAMES[1], polish="auto")[0]
    torch.testing.assert_close(p, reference, rtol=1e-7, atol=1e-7)


@BY_MODEL
def test_residuals_may_vanish(solver: str) -> None:
    """Where they do, Gauss–Newton converges quadratically."""
    true = torch.tensor([[2.0, 1.0, 0.5], [1.5, 0.7, 0.1]])
    p, info = fit(decay, torch.ones(2, 3), decay(true, torch.zeros(2, 50)), solver=solver)
    torch.testing.assert_close(p, true, rtol=1e-12, atol=1e-12)
    assert int(info.iterations.max()) <= 10


@BY_MODEL
def test_linear_problem_takes_a_step(solver: str) -> None:
    A, b = torch.randn(8, 3), torch.randn(4, 8)
    y, info = fit(lambda y, b: y @ A.T - b, torch.zeros(4, 3), b, solver=solver)
    torch.testing.assert_close(y, torch.linalg.lstsq(A, b.T).solution.T, rtol=1e-11, atol=1e-11)
    assert int(info.iterations.max()) <= (6 if "levenberg" in solver else 3)


@SOLVERS
@pytest.mark.parametrize("start", [[-1.2, 1.0], [5.0, -7.0]])
def test_rosenbrock(solver: str, start: list[float]) -> None:
    f = lambda y: torch.stack([10 * (y[..., 1] - y[..., 0] ** 2), 1 - y[..., 0]], -1)  # noqa: E731
    y, _ = fit(f, torch.tensor([start]), solver=solver)
    torch.testing.assert_close(y, torch.ones(1, 2), rtol=1e-7, atol=0)


@BY_MODEL
def test_steps_that_raise_the_cost_are_taken_back(solver: str) -> None:
    """arctan from 3: a full Gauss–Newton step lands at −9.5, and so on outwards."""
    y, _ = fit(lambda y: torch.atan(y), torch.tensor([[3.0]]), solver=solver)
    assert abs(float(y)) < 1e-10
    if solver != "torch.levenberg_marquardt":
        wild = fit(
            lambda y: torch.atan(y), torch.tensor([[3.0]]), solver=solver,
            options={"safeguard": False, "maxiter": 20},
        )  # fmt: skip
        assert not abs(float(wild[0])) < 10


@BY_MODEL
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_units_of_the_unknowns_do_not_matter(solver: str, scale: float) -> None:
    data, units = measured(), torch.tensor([1.0, scale, 1.0])
    start = torch.ones(6, 3)
    plain = fit(decay, start, data, solver=solver)[0]
    p, _ = fit(lambda p, data: decay(p * units, data), start / units, data, solver=solver)
    torch.testing.assert_close(p * units, plain, rtol=1e-8, atol=1e-8)


@BY_MODEL
def test_rank_deficient_residuals(solver: str) -> None:
    """Only y₁ + y₂ is determined: some minimum is found, and the derivative is refused."""
    b = torch.tensor([[3.0]], requires_grad=True)
    f = lambda y, b: (y.sum(-1, keepdim=True) - b).expand(*y.shape[:-1], 3)  # noqa: E731
    y, info = fit(f, torch.zeros(1, 2), b, solver=solver)
    assert bool(info.ok.all())
    assert abs(float(y.detach().sum()) - 3) < 1e-8
    with pytest.raises(inv.SingularJacobianError):
        torch.autograd.grad(y.sum(), b)


@BY_MODEL
def test_jacobian_of_the_user_is_used_and_changes_nothing(solver: str) -> None:
    calls = []

    def jacobian(p: Tensor, data: Tensor) -> Tensor:
        calls.append(1)
        return decay_jacobian(p, data)

    data = measured()
    theirs = fit(decay, torch.ones(6, 3), data, solver=solver, jacobian=jacobian)
    ours = fit(decay, torch.ones(6, 3), data, solver=solver)
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-10, atol=1e-10)
    assert len(calls) == int(theirs[1].iterations.max())


@BY_MODEL
def test_wrong_jacobian_of_the_user_is_found_out(solver: str) -> None:
    """What is measured at the end is the gradient of the residuals themselves."""
    wrong = lambda p, data: decay_jacobian(p, data) * torch.tensor([1.0, 1.0, 0.0]) + 0.1  # noqa: E731
    _, info = fit(decay, torch.ones(6, 3), measured(), solver=solver, jacobian=wrong)
    assert not info.ok.any()


@SOLVERS
def test_each_sample_goes_as_if_alone(solver: str) -> None:
    """Elementwise problems: easy, far, NaN, and one whose residuals remain large."""
    f = lambda y, a: torch.cat([y**2 - a, 0.1 * (y - 1)], -1)  # noqa: E731
    a = torch.tensor([[2.0], [100.0], [torch.nan], [0.3]])
    start = torch.tensor([[1.0], [0.5], [1.0], [0.4]])
    run = lambda rows: fit(f, start[rows], a[rows], solver=solver)  # noqa: E731
    together, info = run(slice(None))
    assert [status is Status.CONVERGED for status in info.status] == [True, True, False, True]
    for i in range(4):
        alone, of_one = run(slice(i, i + 1))
        assert torch.equal(together[i].nan_to_num(9.0), alone[0].nan_to_num(9.0))
        assert int(info.iterations[i]) == int(of_one.iterations[0])


@BY_MODEL
def test_who_else_is_near_does_not_matter(solver: str) -> None:
    """On the CPU nobody is tested while all steps are long: next to a finished sample, too."""
    f = lambda y, c: y - c  # noqa: E731
    c = torch.tensor([[1e-12], [1.0]])
    start = torch.tensor([[1e3], [1.0]])
    together = fit(f, start, c, solver=solver)[1]
    for i in range(2):
        alone = fit(f, start[i : i + 1], c[i : i + 1], solver=solver)[1]
        assert int(alone.iterations[0]) == int(together.iterations[i])


@SOLVERS
def test_how_often_it_is_asked_does_not_matter(solver: str) -> None:
    data = measured()
    first = fit(decay, torch.ones(6, 3), data, solver=solver)
    for every in (4, 1000):
        again = fit(
            decay, torch.ones(6, 3), data, solver=solver, options={"check_every": every, "maxiter": 100}
        )
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1].iterations, again[1].iterations)


@SOLVERS
def test_maxiter_is_kept_and_told(solver: str) -> None:
    with pytest.raises(
        inv.ConvergenceError, match=rf"NOT_CONVERGED, the solver gave up.*{solver} with maxiter=2"
    ) as caught:
        inv.least_squares(decay, torch.ones(3), measured(batch=1)[0], solver=solver, options={"maxiter": 2})
    assert int(caught.value.info.iterations) == 2


@SOLVERS
def test_float32(solver: str) -> None:
    data = measured().float()
    p, info = fit(
        lambda p, d: decay(p, d).float(), torch.ones(6, 3, dtype=torch.float32), data, solver=solver
    )
    assert p.dtype == torch.float32
    assert bool(info.ok.all())
    reference = fit(decay, torch.ones(6, 3), data.double(), solver=NAMES[1])[0]
    torch.testing.assert_close(p.double(), reference, rtol=2e-3, atol=2e-3)


# --- L-BFGS alone ---------------------------------------------------------------------------------------


def valley(y: Tensor, a: Tensor) -> Tensor:
    return ((a - y[..., :-1]) ** 2 + 100 * (y[..., 1:] - y[..., :-1] ** 2) ** 2).sum(-1)


def test_lbfgs_follows_a_valley_of_many_unknowns() -> None:
    a = torch.tensor([[1.0], [1.1]])
    y, info = inv.minimize(valley, torch.zeros(2, 30), a, solver="torch.lbfgs", return_info=True)
    torch.testing.assert_close(y[0], torch.ones(30), rtol=1e-5, atol=0)
    assert int(info.iterations.max()) < 400


def test_lbfgs_ends_on_quadratics_within_its_memory() -> None:
    A = torch.diag(torch.tensor([1.0, 10.0, 100.0, 3.0]))
    f = lambda y, b: 0.5 * ((y @ A) * y).sum(-1) - (b * y).sum(-1)  # noqa: E731
    b = torch.randn(3, 4)
    y, info = inv.minimize(f, torch.zeros(3, 4), b, solver="torch.lbfgs", return_info=True)
    torch.testing.assert_close(y, b / A.diagonal(), rtol=1e-7, atol=1e-8)
    assert int(info.iterations.max()) < 30


def test_lbfgs_gives_up_where_there_is_no_minimum() -> None:
    a = torch.tensor([[2.0], [-1.0]])
    f = lambda y, a: (y.exp() - a * y).sum(-1)  # noqa: E731
    _, info = inv.minimize(f, torch.zeros(2, 1), a, solver="torch.lbfgs", on_failure="nan", return_info=True)
    assert info.status[0] is Status.CONVERGED
    assert info.status[1] is Status.NOT_CONVERGED
    assert int(info.iterations[1]) < 100


def test_lbfgs_keeps_out_of_forbidden_ground() -> None:
    """A first step of length 1 from 0.5 would land where the logarithm is NaN."""
    f = lambda y: (y - y.log()).sum(-1)  # noqa: E731
    y = inv.minimize(f, torch.tensor([[0.01], [0.5]]), solver="torch.lbfgs")
    torch.testing.assert_close(y, torch.ones(2, 1), rtol=1e-7, atol=0)
