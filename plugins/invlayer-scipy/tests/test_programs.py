"""Linear programs by scipy.linprog: values, multipliers, derivatives; scipy.milp says that it has none."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog

import invlayer_core as inv

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")


def program() -> dict[str, torch.Tensor]:
    """Chvátal, Linear Programming (1983), chapter 1: the optimum is 13 at (2, 0, 1)."""
    return {
        "q": torch.tensor([-5.0, -4.0, -3.0], dtype=torch.float64),
        "G": torch.tensor([[2.0, 3.0, 1.0], [4.0, 1.0, 2.0], [3.0, 4.0, 2.0]], dtype=torch.float64),
        "h": torch.tensor([5.0, 11.0, 8.0], dtype=torch.float64),
        "lb": torch.zeros(3, dtype=torch.float64),
    }


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", ["highs", "highs-ds", "highs-ipm"])
def test_a_published_program(method: str, sparse: bool) -> None:
    given = program()
    h = given["h"].requires_grad_()
    G = given["G"].to_sparse() if sparse else given["G"]
    x, multipliers = inv.qp(
        None, given["q"], G, h, lb=given["lb"], solver="scipy.linprog", options={"method": method},
        return_multipliers=True,
    )  # fmt: skip
    assert torch.allclose(x, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(
        multipliers.inequalities, torch.tensor([1.0, 0.0, 1.0]).double(), rtol=0, atol=1e-12
    )
    (slope,) = torch.autograd.grad(given["q"] @ x, h)  # of the optimum: minus the multipliers
    assert torch.allclose(slope, torch.tensor([-1.0, 0.0, -1.0]).double(), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h: inv.qp(None, given["q"], G, h, lb=given["lb"], solver="scipy.linprog"), h
    )


def test_all_kinds_of_constraints_agree_with_linprog() -> None:
    torch.manual_seed(3)
    A, inside = torch.randn(2, 6).double(), torch.rand(6).double()
    q, b = torch.randn(6).double(), A @ inside
    lb, ub = torch.zeros(6).double(), torch.ones(6).double()
    x = inv.qp(None, q, A=A, b=b, lb=lb, ub=ub, solver="scipy.linprog")
    other = linprog(q.numpy(), A_eq=A.numpy(), b_eq=b.numpy(), bounds=(0, 1)).x
    assert torch.allclose(x, torch.from_numpy(other), rtol=0, atol=1e-9)


def test_gradient_for_the_cost_is_zero_with_a_warning() -> None:
    given = program()
    q = given.pop("q").requires_grad_()
    with pytest.warns(inv.DegeneracyWarning, match="piecewise constant"):
        x = inv.qp(None, q, **given, solver="scipy.linprog")
    x.sum().backward()
    assert q.grad.abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.tensor([-1.0, 11.0, 8.0]).double()}, "infeasible"),
        ({"G": -program()["G"]}, "unbounded"),
    ],
)
def test_no_solution(change: dict, message: str) -> None:
    with pytest.raises(inv.ConvergenceError, match=message):
        inv.qp(None, **{**program(), **change}, solver="scipy.linprog")


def test_refusals() -> None:
    with pytest.raises(inv.ConditionsError, match=r"for linear programs, and P is given. Accepted is P=None"):
        inv.qp(torch.eye(3).double(), **program(), solver="scipy.linprog")
    with pytest.raises(TypeError, match="unknown options colour; accepted are method and options"):
        inv.qp(None, **program(), solver="scipy.linprog", options={"colour": 1})
    with pytest.raises(inv.ConditionsError, match=r"mixed-integer program has no .*DLM\(resolve=True\)"):
        inv.qp(None, **program(), solver="scipy.milp", options={"integrality": 1})
