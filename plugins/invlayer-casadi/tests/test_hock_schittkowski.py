"""Published optima (Hock & Schittkowski 1981), by nlpsol and through Opti, with 60-digit derivatives.

``data/hs.json`` names its sources; in it L = f − Σ l eq − Σ m ineq with eq = 0, ineq ≥ 0, m ≥ 0.
"""

import json
import math
from pathlib import Path
from typing import Any

import casadi as ca
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi import CasadiLayer

F64 = torch.float64
CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "data" / "hs.json").read_text())["cases"]
}
REGULAR = [name for name, case in CASES.items() if case["degenerate"] is None]
DEGENERATE = [name for name in CASES if name not in REGULAR]


def numbers(strings: Any) -> Tensor:
    def read(value: Any) -> Any:
        return (
            [read(v) for v in value] if isinstance(value, list) else float(eval(value, {"sqrt": math.sqrt}))
        )

    return torch.tensor(read(strings), dtype=F64)


def expressions(case: dict, x: Any, p: Any) -> tuple[Any, Any, Any]:
    """Objective, equalities and inequalities in CasADi symbols."""
    names = {name: x[i] for i, name in enumerate(case["vars"])} | {"exp": ca.exp}
    names |= {name: p[i] for i, name in enumerate(case["params"])}
    read = lambda text: eval(text, dict(names))  # noqa: E731
    eq, ineq = ([read(text) for text in case[key]] for key in ("eq", "ineq_ge0"))
    return read(case["objective"]), eq, ineq


def by_nlpsol(case: dict, **keywords: Any):
    """``p -> (x, lam_g)``."""
    x, p = ca.SX.sym("x", len(case["vars"])), ca.SX.sym("p", len(case["params"]))
    f, eq, ineq = expressions(case, x, p)
    layer = CasadiLayer(
        {"x": x, "p": p, "f": f, "g": ca.vertcat(*eq, *ineq)}, outputs=("x", "f", "lam_g"), **keywords
    )
    upper = torch.tensor([0.0] * len(eq) + [math.inf] * len(ineq), dtype=F64)
    solve = lambda p: layer(p, x0=numbers(case["start"]), lbg=0.0, ubg=upper)  # noqa: E731
    solve.pattern = layer.problem.jacobian.pattern
    return solve


def by_opti(case: dict, **keywords: Any):
    opti = ca.Opti()
    x, p = opti.variable(len(case["vars"])), opti.parameter(len(case["params"]))
    f, eq, ineq = expressions(case, x, p)
    opti.minimize(f)
    for each in eq:
        opti.subject_to(each == 0)
    for each in ineq:
        opti.subject_to(each >= 0)
    opti.set_initial(x, numbers(case["start"]).numpy())
    return CasadiLayer.from_opti(opti, [p], [x, f, opti.lam_g], **keywords)


def test_all_cases_are_run() -> None:
    assert (len(REGULAR), DEGENERATE) == (12, ["HS026"])


@pytest.mark.parametrize("make", [by_nlpsol, by_opti])
@pytest.mark.parametrize("name", REGULAR)
def test_optimum_and_derivatives(name: str, make: Any) -> None:
    case = CASES[name]
    p = numbers(case["param_values"])
    solve = make(case)
    x, f, lam_g = solve(p)
    torch.testing.assert_close(x, numbers(case["x_star"]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f, numbers([case["f_star"]]), rtol=1e-12, atol=1e-12)
    dx = torch.func.jacrev(lambda p: solve(p)[0])(p)
    torch.testing.assert_close(dx, numbers(case["dx_dparams"]), rtol=1e-12, atol=1e-12)
    df = torch.func.jacrev(lambda p: solve(p)[1])(p)
    torch.testing.assert_close(df[0], numbers(case["df_dparams"]), rtol=1e-12, atol=1e-12)
    multipliers = [*case["eq_multipliers"], *case["ineq_multipliers"].values()]
    rows = [*range(len(case["eq"])), *(len(case["eq"]) + i for i in case["active_set"])]
    torch.testing.assert_close(-lam_g[rows], numbers(multipliers), rtol=1e-11, atol=1e-11)


def by_sparse_factors(case: dict, **keywords: Any):
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.SparseLU(by_nlpsol(case).pattern))
    return by_nlpsol(case, adjoint=adjoint, **keywords)


@pytest.mark.parametrize("make", [by_nlpsol, by_opti, by_sparse_factors])
@pytest.mark.parametrize("name", DEGENERATE)
def test_a_flat_minimum_is_found_and_named_as_singular(name: str, make: Any) -> None:
    """The objective grows with the fourth power along the equation: the conditions define no derivative."""
    case = CASES[name]
    p = numbers(case["param_values"]).requires_grad_()
    (x, f, lam_g), info = make(case, return_info=True)(p)
    assert info.ok.all()
    torch.testing.assert_close(f, numbers([case["f_star"]]), rtol=0, atol=1e-12)
    # The residual is the third power of the distance: 1e-12 in the one is 1e-4 in the other.
    torch.testing.assert_close(x, numbers(case["x_star"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(lam_g, -numbers(case["eq_multipliers"]), rtol=0, atol=1e-6)
    for output in x:
        with pytest.raises(inv.SingularJacobianError, match=r"singular at the solution of sample 0"):
            torch.autograd.grad(output, p, retain_graph=True)


@pytest.mark.parametrize("name", ["HS035", "HS071", "HS080"])
def test_forward_mode_and_multiplier_derivatives(name: str) -> None:
    case = CASES[name]
    p, solve = numbers(case["param_values"]), by_nlpsol(case)
    dx, _, dlam = torch.func.jacfwd(solve)(p)
    torch.testing.assert_close(dx, numbers(case["dx_dparams"]), rtol=1e-12, atol=1e-12)
    rows = [*range(len(case["eq"])), *(len(case["eq"]) + i for i in case["active_set"])]
    torch.testing.assert_close(-dlam[rows], numbers(case["dmultipliers_dparams"]), rtol=1e-11, atol=1e-11)
