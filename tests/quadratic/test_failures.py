"""Programs without a solution, inputs without sense, solvers that lie: typed, and no finite gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.quadratic.programs import TryAll, leaves, program
from torch import Tensor

import invlayer_core as inv

EYE = torch.eye(2, dtype=torch.float64)
NAN, INF = float("nan"), float("inf")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


HOPELESS: dict[str, dict[str, Any]] = {
    "infeasible rows": {"G": matrix((1, 0), (-1, 0)), "h": vector(-1, -1)},
    "infeasible equations": {"A": matrix((1, 1), (1, 1)), "b": vector(0, 1)},
    "crossed bounds": {"lb": vector(1, 1), "ub": vector(0, 0)},
    "unbounded": {"P": matrix((1, 0), (0, 0)), "q": vector(1, -1), "G": matrix((1, 0)), "h": vector(1)},
    "unbounded linear program": {"P": None, "q": vector(1, -1), "lb": vector(0, 0)},
    "concave": {"P": matrix((1, 0), (0, -1)), "q": vector(1, 0.1), "lb": vector(-1, -1), "ub": vector(1, 1)},
    "NaN in q": {"q": vector(1, NAN), "lb": vector(0, 0)},
    "NaN in P": {"P": EYE * NAN, "lb": vector(0, 0)},
    "NaN in G": {"G": matrix((NAN, 0)), "h": vector(1)},
    "NaN in h": {"G": matrix((1, 0)), "h": vector(NAN)},
    "NaN in A": {"A": matrix((NAN, 0)), "b": vector(1)},
    "NaN in b": {"A": matrix((1, 0)), "b": vector(NAN)},
    "NaN in lb": {"lb": vector(0, NAN)},
    "NaN in ub": {"ub": vector(0, NAN)},
    "infinite q": {"q": vector(INF, 0), "lb": vector(0, 0), "ub": vector(1, 1)},
    "h of minus infinity": {"G": matrix((1, 0)), "h": vector(-INF)},
}


class Garbage(inv.Solver):
    """Says that it has found what it has not."""

    def solve(self, problem, y0, options):
        x = np.full(problem.size, options.get("value", 2e9))
        return inv.SolverResult(y=problem.answer(x), success=True)


def made(change: dict[str, Any]) -> dict[str, Tensor]:
    return {"P": EYE, "q": vector(1.0, 1.0), **change}


@pytest.mark.parametrize("name", HOPELESS)
@pytest.mark.parametrize("solver", ["torch.qp", TryAll(), Garbage()], ids=["torch.qp", "try all", "garbage"])
@pytest.mark.filterwarnings("ignore:qp with P=None:invlayer_core.DegeneracyWarning")
def test_no_gradient_is_finite(name: str, solver: Any) -> None:
    given = {k: v for k, v in made(HOPELESS[name]).items() if v is not None}
    inputs = leaves(given)
    x, info = inv.qp(
        **{"P": None, **inputs}, solver=solver, on_failure="nan", return_info=True,
        return_multipliers=False,
    )  # fmt: skip
    assert not info.ok
    assert not info.status[0].ok
    assert x.isnan().all()
    x.sum().backward()
    for tensor in inputs.values():
        assert tensor.grad.isnan().all()
    with pytest.raises(inv.ConvergenceError):
        inv.qp(**{"P": None, **given}, solver=solver)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("infeasible rows", "primal infeasible"),
        ("infeasible equations", "primal infeasible"),
        ("crossed bounds", "primal infeasible"),
        ("unbounded", "unbounded"),
        ("unbounded linear program", "unbounded"),
        ("concave", "P is not positive semidefinite"),
        ("NaN in q", "The inputs already hold NaN"),
    ],
)
def test_messages_name_the_cause(name: str, message: str) -> None:
    with pytest.raises(inv.ConvergenceError, match=message):
        inv.qp(**made(HOPELESS[name]), solver="torch.qp")


def test_per_sample_solvers_never_see_nan() -> None:
    class Never(inv.Solver):
        def solve(self, problem, y0, options):
            raise AssertionError("called")

    with pytest.raises(inv.ConvergenceError, match="q holds NaN or infinity; the solver was not called"):
        inv.qp(EYE, vector(1.0, NAN), solver=Never())


def test_one_bad_sample_leaves_the_others_alone() -> None:
    q = torch.stack([vector(-0.5, -3.0), vector(NAN, 0.0), vector(-2.0, 0.5)]).requires_grad_()
    ub = vector(1.0, 1.0).requires_grad_()
    for policy, bad in (("nan", NAN), ("zero_grad", 0.0)):
        x, info = inv.qp(EYE, q, ub=ub, solver="torch.qp", on_failure=policy, return_info=True)
        assert info.ok.tolist() == [True, False, True]
        assert info.status[1] is inv.Status.NOT_FINITE
        (q_bar,) = torch.autograd.grad(x[[0, 2]].sum(), q, retain_graph=True)
        assert q_bar[[0, 2]].tolist() == [[-1.0, 0.0], [0.0, -1.0]]
        assert q_bar[1].tolist() == [0.0, 0.0]  # nothing was asked of it
        (q_bar,) = torch.autograd.grad(x.sum(), q)
        assert (q_bar[1].isnan().all() if bad else q_bar[1].eq(0).all()) or policy == "zero_grad"


def test_warn_goes_on_with_what_there_is() -> None:
    with pytest.warns(inv.ConvergenceWarning, match="Garbage: 1 of 1 samples"):
        x = inv.qp(EYE, vector(1.0, 1.0), G=EYE, h=vector(0.0, 0.0), solver=Garbage(), options={"value": 3.0},
                   polish=0, on_failure="warn")  # fmt: skip
    assert x.tolist() == [3.0, 3.0]


def test_an_exception_stays_with_its_sample() -> None:
    class Moody(TryAll):
        def solve(self, problem, y0, options):
            if problem.index == 1:
                raise RuntimeError("not today")
            return super().solve(problem, y0, options)

    given = program(batched="q")
    x, info = inv.qp(**given, solver=Moody(), on_failure="nan", return_info=True)
    assert info.status[1] is inv.Status.SOLVER_ERROR
    assert "not today" in info.message[1]
    assert info.ok.tolist() == [True, False, True]
    assert torch.equal(x[0], inv.qp(**given, solver=TryAll())[0])


def test_a_second_derivative_over_a_failed_sample() -> None:
    q = torch.stack([vector(-0.5, -3.0), vector(NAN, 0.0)]).requires_grad_()
    P = (2 * EYE).requires_grad_()
    x = inv.qp(P, q, ub=vector(1.0, 1.0), solver="torch.qp", on_failure="zero_grad")
    (bar,) = torch.autograd.grad((x[0] ** 2).sum(), P, create_graph=True)
    (second,) = torch.autograd.grad(bar.sum(), q)
    assert second[0].isfinite().all()
    assert second[0, 0] != 0
    assert second[1].tolist() == [0.0, 0.0]
