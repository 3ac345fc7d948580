"""The active set is certified: against solvers that are not exact, bad scaling, and degenerate programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.quadratic.programs import TryAll, kkt_solution, leaves, program
from torch import Tensor

import invlayer_core as inv

EYE = torch.eye(2, dtype=torch.float64)
SUDOKUS = json.loads((Path(__file__).parents[1] / "data" / "sudoku.json").read_text())["cases"]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exact(given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """z, and the gradients of the sum of x, on the active set that trying all of them finds."""
    inputs = leaves(given)
    x, multipliers = inv.qp(**given, solver=TryAll(), polish=0, return_multipliers=True)
    active = torch.cat([torch.ones_like(multipliers.equalities), *multipliers[1:]]) > 0
    z = kkt_solution(inputs, active)
    grads = torch.autograd.grad(z[: len(x)].sum(), tuple(inputs.values()), materialize_grads=True)
    return z.detach(), dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("solver", [TryAll(1e-4), TryAll(1e-2), TryAll(1e-3, hide=True)])
def test_inexact_answers_are_polished_to_the_last_digits(seed: int, solver: TryAll) -> None:
    torch.manual_seed(seed)
    given = program()
    z, grads = exact(given)
    inputs = leaves(given)
    (x, multipliers), info = inv.qp(**inputs, solver=solver, return_multipliers=True, return_info=True)
    assert not info.aux[0]["ambiguous"]
    assert 1 <= info.aux[0]["systems"] <= 10
    assert (torch.cat([x, *multipliers]) - z).abs().max() <= 1e-11 * (1 + z.abs().max())
    x.sum().backward()
    for name, wanted in grads.items():
        assert (inputs[name].grad - wanted).abs().max() <= 1e-9 * (1 + wanted.abs().max()), name


def test_a_wrong_active_set_is_put_right() -> None:
    """The solver's slack and multiplier both speak for the wrong side, by 1e-5."""

    class Wrong(inv.Solver):
        def solve(self, problem, y0, options):
            return inv.SolverResult(y=problem.answer([1.0, 1.0 - 1e-6], upper=[1e-6, 1e-5]))

    q = vector(-1.00001, -0.99999).requires_grad_()
    x, info = inv.qp(EYE, q, ub=vector(1.0, 1.0), solver=Wrong(), return_info=True)
    assert x.tolist() == [1.0, 0.99999]
    assert info.constraints.active.tolist() == [True, False]
    x.sum().backward()
    assert q.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("what", ["rows", "objective", "x"])
def test_scaling_changes_no_active_set(scale: float, what: str) -> None:
    given = program("P q G h A b")
    z, _ = exact(given)
    scaled, x_scale = dict(given), 1.0
    if what == "rows":
        for name in ("G", "A"):
            scaled[name] = given[name] * scale
        scaled["h"], scaled["b"] = given["h"] * scale, given["b"] * scale
    elif what == "objective":
        scaled["P"], scaled["q"] = given["P"] * scale, given["q"] * scale
    else:
        x_scale = scale
        scaled["q"], scaled["h"], scaled["b"] = (given[name] * scale for name in ("q", "h", "b"))
    for solver in ("torch.qp", TryAll()):
        x, info = inv.qp(**scaled, solver=solver, return_info=True)
        assert (x / x_scale - z[:3]).abs().max() <= 1e-10
        assert not info.aux[0]["ambiguous"]
        assert info.constraints.active.tolist() == [True, *(z[4:] > 0).tolist()]


def test_weakly_active_constraints_are_flagged_and_warned_of() -> None:
    q = vector(0.0, 1.0).requires_grad_()
    lb = torch.zeros(2, dtype=torch.float64)
    with pytest.warns(inv.DegeneracyWarning, match=r"1 of 1 samples is ambiguous \(the first is sample 0\)"):
        x, info = inv.qp(EYE, q, lb=lb, solver="torch.qp", return_info=True)
    assert info.aux[0]["ambiguous"]
    assert info.constraints.weakly_active.tolist() == [True, False]
    assert info.constraints.active.tolist() == [False, True]
    x.sum().backward()
    assert q.grad.tolist() == [-1.0, 0.0]  # the derivative from the side where the bound is idle
    assert not inv.qp(EYE, q.detach(), lb=lb, solver="torch.qp").requires_grad  # and no warning


def test_equal_bounds_fix_a_variable() -> None:
    lb, ub = vector(1.0, 0.0).requires_grad_(), vector(1.0, 3.0).requires_grad_()
    x, info = inv.qp(EYE, vector(-2.0, -1.0), lb=lb, ub=ub, solver="torch.qp", return_info=True)
    assert x.tolist() == [1.0, 1.0]
    assert not info.aux[0]["ambiguous"]
    assert not info.constraints.weakly_active.any()
    x.sum().backward()
    assert (lb.grad + ub.grad).tolist() == [1.0, 0.0]


def test_redundant_equations_have_least_norm_multipliers_and_the_right_derivative() -> None:
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    b = vector(1.0, 2.0)
    q = vector(-3.0, 1.0).requires_grad_()
    (x, multipliers), info = inv.qp(
        EYE, q, A=A, b=b, solver="torch.qp", return_multipliers=True, return_info=True
    )
    assert (x - vector(2.5, -1.5)).abs().max() <= 1e-12
    assert not info.constraints.independent
    assert not info.aux[0]["ambiguous"]
    (bar,) = torch.autograd.grad(x[0], q)
    assert (bar - vector(-0.5, 0.5)).abs().max() <= 1e-12
    assert (multipliers.equalities - vector(0.1, 0.2)).abs().max() <= 1e-12


def test_multipliers_of_redundant_rows_have_no_derivative() -> None:
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    q = vector(-3.0, 1.0).requires_grad_()
    _, multipliers = inv.qp(EYE, q, A=A, b=vector(1.0, 2.0), solver="torch.qp", return_multipliers=True)
    with pytest.raises(inv.SingularJacobianError, match=r"sample 0, of 1 samples.*that were asked"):
        multipliers.equalities[0].backward()


@pytest.mark.parametrize(("policy", "wanted"), [("lstsq", None), ("nan", "nan"), ("zero", 0.0)])
def test_singular_policies(policy: str, wanted: object) -> None:
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    q = vector(-3.0, 1.0).requires_grad_()
    _, multipliers = inv.qp(
        EYE, q, A=A, b=vector(1.0, 2.0), solver="torch.qp", return_multipliers=True,
        adjoint=inv.adjoints.Implicit(singular=policy),
    )  # fmt: skip
    multipliers.equalities[0].backward()
    if wanted == "nan":
        assert q.grad.isnan().all()
    elif wanted is None:  # the least-norm multiplier is (1, 2) / 5 times that of one row, -(q1 + q2 + 1) / 2
        assert (q.grad - vector(-0.1, -0.1)).abs().max() <= 1e-12
    else:
        assert q.grad.tolist() == [wanted, wanted]


def test_raise_refuses_redundant_rows_altogether() -> None:
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    q = vector(-3.0, 1.0).requires_grad_()
    x = inv.qp(
        EYE, q, A=A, b=vector(1.0, 2.0), solver="torch.qp", adjoint=inv.adjoints.Implicit(singular="raise")
    )
    with pytest.raises(inv.SingularJacobianError, match="Accepted are regular samples"):
        x.sum().backward()


def test_an_x_that_is_not_unique() -> None:
    """min −x₁ − x₂ on the simplex: every point of an edge is optimal."""
    b = vector(1.0).requires_grad_()
    ones = torch.ones(1, 2, dtype=torch.float64)
    with pytest.warns(inv.DegeneracyWarning, match="x is not unique"):
        x = inv.qp(None, vector(-1.0, -1.0), A=ones, b=b, lb=torch.zeros(2).double(), solver="torch.qp")
    x.sum().backward(retain_graph=True)
    assert abs(b.grad - 1) <= 1e-12
    with pytest.raises(inv.SingularJacobianError):
        x[0].backward()


def test_linear_programs_warn_that_they_are_piecewise_constant() -> None:
    q = vector(-1.0, -2.0).requires_grad_()
    ub = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(inv.DegeneracyWarning, match="piecewise constant function of q"):
        x = inv.qp(None, q, ub=ub, lb=torch.zeros(2).double(), solver="torch.qp")
    x.sum().backward()
    assert q.grad.tolist() == [0.0, 0.0]
    assert ub.grad.tolist() == [1.0, 1.0]
    inv.qp(
        None, q.detach(), ub=ub, lb=torch.zeros(2).double(), solver="torch.qp"
    )  # zero is meant: no warning


def test_without_polish_the_sides_are_taken_as_they_look() -> None:
    q = vector(-0.5, -3.0).requires_grad_()
    x, info = inv.qp(EYE, q, ub=vector(1.0, 1.0), solver=TryAll(1e-8), polish=0, return_info=True, rtol=1e-6)
    assert info.aux[0]["systems"] == 0
    assert info.constraints.active.tolist() == [False, True]
    x.sum().backward()
    assert q.grad.tolist() == [-1.0, 0.0]


def sudoku_rows() -> Tensor:
    """Each cell, row, column and block of a 4 × 4 sudoku holds each digit once: 64 equations of rank 40."""
    cube = torch.arange(64).reshape(4, 4, 4)
    groups = [cube[i, j] for i in range(4) for j in range(4)]
    for digit in range(4):
        groups += [cube[i, :, digit] for i in range(4)] + [cube[:, j, digit] for j in range(4)]
        groups += [cube[i : i + 2, j : j + 2, digit].reshape(-1) for i in (0, 2) for j in (0, 2)]
    A = torch.zeros(64, 64, dtype=torch.float64)
    for row, group in enumerate(groups):
        A[row, group] = 1.0
    return A


@pytest.mark.parametrize("case", [c for c in SUDOKUS if "solution" in c], ids=lambda case: case["name"])
def test_sudoku(case: dict) -> None:
    """Published puzzles: the solution is a strictly complementary vertex, so that its derivative is zero."""
    givens = torch.tensor(case["givens"])
    p = torch.nn.functional.one_hot(givens, 5)[..., 1:].reshape(-1).double().requires_grad_()
    A = sudoku_rows()
    assert torch.linalg.matrix_rank(A) == 40
    (x, info) = inv.qp(
        0.1 * torch.eye(64).double(), -p, A=A, b=torch.ones(64).double(), lb=torch.zeros(64).double(),
        solver="torch.qp", return_info=True,
    )  # fmt: skip
    solution = torch.tensor(case["solution"]) - 1
    assert (x.reshape(4, 4, 4) - torch.nn.functional.one_hot(solution, 4)).abs().max() <= 1e-9
    assert not info.aux[0]["ambiguous"]
    assert not info.constraints.independent
    jacobian = torch.autograd.functional.jacobian(
        lambda p: inv.qp(
            0.1 * torch.eye(64).double(), -p, A=A, b=torch.ones(64).double(), lb=torch.zeros(64).double(),
            solver="torch.qp",
        ),
        p.detach(), vectorize=True,
    )  # fmt: skip
    assert jacobian.abs().max() <= 1e-9
