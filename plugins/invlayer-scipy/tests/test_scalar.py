"""Scalar equations: brackets as tensors, exact derivatives, and every failure in SciPy's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import optimize
from torch import Tensor

import invlayer_core as inv

FLOAT = torch.float64
THREE = torch.zeros(3, dtype=FLOAT)
BRACKETING = ["brentq", "brenth", "ridder", "bisect", "toms748"]


def kepler(E: Tensor, M: Tensor, e: Tensor) -> Tensor:
    """E − e sin E = M: the eccentric anomaly of an orbit; ∂E/∂M = 1 / (1 − e cos E)."""
    return E - e * torch.sin(E) - M


def orbits(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    M = 3 * torch.rand(shape, generator=generator, dtype=FLOAT)
    return M.requires_grad_(), (0.9 * torch.rand(shape, generator=generator, dtype=FLOAT)).requires_grad_()


def solve(solver: str, M: Tensor, e: Tensor, **options: Any) -> tuple[Tensor, inv.SolveInfo]:
    return inv.root(
        kepler, M.detach().clone(), (M, e), solver=f"scipy.{solver}", options=options, event_dims=0,
        return_info=True, atol=1e-11,
    )  # fmt: skip


def around(M: Tensor) -> tuple[Tensor, Tensor]:
    return M.detach() - 0.1, M.detach() + 1


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        *((name, {"bracket": around}) for name in BRACKETING),
        ("newton", {}),
        ("newton", {"method": "halley"}),
        ("newton", {"method": "secant", "x1": lambda M: M.detach() + 0.5}),
        ("find_root", {"bracket": around}),
        ("find_root", {"bracket_root": {"factor": 1.5}}),
        ("find_root", {}),
    ],
)
def test_values_and_gradients(solver: str, options: dict, shape: tuple[int, ...]) -> None:
    M, e = orbits(*shape)
    given = {name: value(M) if callable(value) else value for name, value in options.items()}
    E, info = solve(solver, M, e, **given)
    assert E.shape == M.shape
    assert info.ok.all()
    gradient_M, gradient_e = torch.autograd.grad(E.sum(), (M, e))
    slope = 1 - e * torch.cos(E.detach())
    torch.testing.assert_close(gradient_M, (1 / slope).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient_e, (torch.sin(E) / slope).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BRACKETING)
def test_is_scipys_own_result(name: str) -> None:
    M, e = orbits(3)
    E, info = solve(name, M, e, bracket=around(M))
    for i in range(3):
        m, k = M[i].detach(), e[i].detach()
        scipys, report = getattr(optimize, name)(
            lambda x, m=m, k=k: float(kepler(torch.tensor(x, dtype=FLOAT), m, k)),
            float(m) - 0.1, float(m) + 1, full_output=True,
        )  # fmt: skip
        assert abs(E[i].item() - scipys) < 1e-11
        assert int(info.iterations[i]) == report.iterations


@pytest.mark.parametrize("how", ["serial", "lockstep", "threads"])
def test_brackets_follow_their_samples(how: str) -> None:
    """sin has many roots; each sample's bracket holds another one."""
    lo = torch.tensor([3.0, 6.0, 9.0], dtype=FLOAT)
    y = inv.root(
        torch.sin, torch.zeros(3, dtype=FLOAT), solver="scipy.brentq", options={"bracket": (lo, lo + 0.5)},
        event_dims=0, batch=how,
    )  # fmt: skip
    torch.testing.assert_close(y, torch.pi * torch.tensor([1, 2, 3], dtype=FLOAT), rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", ["scipy.brentq", "scipy.find_root"])
def test_brackets_under_vmap(solver: str) -> None:
    lo = torch.tensor([[3.0, 6.0], [9.0, 12.0]], dtype=FLOAT)

    def layer(lo: Tensor, shift: Tensor) -> Tensor:
        return inv.root(
            lambda y, shift: torch.sin(y - shift), torch.zeros(2, dtype=FLOAT), shift, solver=solver,
            options={"bracket": (lo, lo + 0.7)}, event_dims=0,
        )  # fmt: skip

    expected = torch.pi * torch.tensor([[1, 2], [3, 4]], dtype=FLOAT)
    y = torch.func.vmap(layer)(lo, torch.zeros(2, 2, dtype=FLOAT))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    shared = torch.func.vmap(layer, in_dims=(None, 0))(lo[0], torch.zeros(2, 2, dtype=FLOAT))
    torch.testing.assert_close(shared, expected[:1].expand(2, 2), rtol=1e-12, atol=0)


def failing(solver: str, f: Any, **options: Any) -> inv.SolveInfo:
    y, info = inv.root(
        f, torch.ones(2, dtype=FLOAT), solver=solver, options=options, event_dims=0, on_failure="nan",
        return_info=True,
    )  # fmt: skip
    assert y[~info.ok].isnan().all()
    return info


@pytest.mark.parametrize(
    ("solver", "f", "options", "message"),
    [
        ("scipy.brentq", torch.exp, {"bracket": (0, 1)}, "f(a) and f(b) must have different signs"),
        ("scipy.toms748", torch.exp, {"bracket": (0, 1)}, "f(a) and f(b) must have different signs"),
        ("scipy.bisect", torch.sin, {"bracket": (3, 4), "maxiter": 2}, "Failed to converge after 2"),
        ("scipy.ridder", torch.log, {"bracket": (-1, 3)}, "is NaN; solver cannot continue"),
        ("scipy.newton", lambda y: y**2 + 1, {}, "Derivative was zero"),
        ("scipy.newton", lambda y: y**2 + 1, {"method": "secant", "maxiter": 5}, "Failed to converge"),
        ("scipy.find_root", torch.exp, {"bracket": (0, 1)}, "The initial bracket was invalid."),
        ("scipy.find_root", torch.sin, {"bracket": (3, 4), "maxiter": 1}, "The maximum number of iterations"),
        ("scipy.find_root", torch.log, {"bracket": (-3, -1)}, "A non-finite value was encountered."),
        ("scipy.find_root", torch.exp, {"bracket_root": {"maxiter": 3}}, "The maximum number of iterations"),
    ],
)  # fmt: skip
def test_failures_keep_scipys_words(solver: str, f: Any, options: dict, message: str) -> None:
    info = failing(solver, f, **options)
    assert {status.name for status in info.status} <= {"NOT_CONVERGED", "NOT_FINITE"}
    assert all(message in words for words in info.message)


def test_one_bad_bracket_leaves_the_others() -> None:
    for solver in ("scipy.brentq", "scipy.find_root"):
        lo = torch.tensor([3.0, 3.5], dtype=FLOAT)
        info = failing(solver, torch.sin, bracket=(lo, torch.full_like(lo, 4.0)))
        assert [status.name for status in info.status] == ["CONVERGED", "NOT_CONVERGED"]


@pytest.mark.parametrize(
    ("solver", "options", "error", "message"),
    [
        ("scipy.brentq", {}, TypeError, r"scipy.brentq: bracket=None; accepted is options="),
        ("scipy.brentq", {"bracket": 3}, TypeError, r"bracket=3; accepted is"),
        ("scipy.brentq", {"bracket": (0, 1), "k": 2}, TypeError, r"scipy.brentq: unknown options \['k'\]"),
        ("scipy.newton", {"x1": 2}, TypeError, r"scipy.newton, method='newton': unknown options \['x1'\]"),
        ("scipy.newton", {"method": "steffensen"}, inv.ConvergenceError, r"unknown method 'steffensen'"),
        ("scipy.find_root", {"bracket": 3}, TypeError, r"bracket=3; accepted is a pair"),
        ("scipy.find_root", {"tolerances": {"xtol": 1}}, TypeError, r"tolerances: unknown options"),
        ("scipy.find_root", {"bracket_root": {"xl0": 1}}, TypeError, r"bracket_root: unknown options"),
        ("scipy.find_root", {"bracket": (0, 1), "bracket_root": {}}, inv.ConvergenceError, r"exclude each"),
        ("scipy.find_root", {"bracket": (THREE, 1)}, inv.ConditionsError, r"bracket\[0\] has shape \(3,\)"),
        ("scipy.brentq", {"bracket": (THREE, 1)}, inv.ConditionsError, r"a tensor in options has shape"),
    ],
)  # fmt: skip
def test_bad_options(solver: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        inv.root(torch.sin, torch.ones(2, dtype=FLOAT), solver=solver, options=options, event_dims=0)


@pytest.mark.parametrize("solver", ["scipy.brentq", "scipy.newton", "scipy.find_root"])
def test_systems_are_refused(solver: str) -> None:
    options = {"bracket": (0.0, 1.0)} if solver == "scipy.brentq" else {}
    with pytest.raises(inv.ConditionsError, match=r"solves scalar equations.* n = 2 unknowns.*event_dims=0"):
        inv.root(torch.sin, torch.ones(3, 2, dtype=FLOAT), solver=solver, options=options)


def test_conditions_that_raise_are_not_taken_for_scipys_failure() -> None:
    def picky(y: Tensor) -> Tensor:
        raise RuntimeError("no connection to the data base")

    with pytest.raises(RuntimeError, match="no connection"):
        failing("scipy.newton", picky)


@pytest.mark.parametrize("method", ["del2", "iteration"])
def test_fixed_points(method: str) -> None:
    a = torch.tensor([[0.5, 1.0], [1.5, 2.0]], dtype=FLOAT, requires_grad=True)
    y, info = inv.fixed_point(
        lambda y, a: torch.cos(a * y) / 2, torch.ones(2, 2, dtype=FLOAT), a, solver="scipy.fixed_point",
        options={"method": method, "xtol": 1e-13}, return_info=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(y.sum(), a)
    sine = torch.sin(a * y).detach()
    expected = (-y * sine / 2 / (1 + a * sine / 2)).detach()
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=0)
    assert (info.iterations > 1).all()


def test_fixed_points_that_run_away() -> None:
    _, info = inv.fixed_point(
        lambda y: 2 * y + 1, torch.ones(1, dtype=FLOAT), solver="scipy.fixed_point",
        options={"method": "iteration", "maxiter": 7}, on_failure="nan", return_info=True,
    )  # fmt: skip
    assert info.status[0] is inv.Status.NOT_CONVERGED
    assert info.message[0].startswith("Failed to converge after 7 iterations")
    for options, message in (
        ({"method": "picard"}, "unknown method 'picard'"),
        ({"tol": 1}, "unknown options"),
    ):
        with pytest.raises((TypeError, inv.ConvergenceError), match=message):
            inv.fixed_point(
                torch.cos, torch.ones(1, dtype=FLOAT), solver="scipy.fixed_point", options=options
            )
