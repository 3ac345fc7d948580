"""The nonlinear regressions of NIST's Statistical Reference Datasets, fitted and differentiated.

``data/nist.json`` (its source is named there) has the certified parameters, refined to 50 digits, and
d(parameters)/d(data), −H⁻¹ ∂²f/∂b∂y with the full Hessian, from sympy derivatives at 60 digits. A
Gauss–Newton stand-in is off by up to 54 %. Problems start from NIST's second start.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.adjoints import DLM

pytestmark = pytest.mark.usefixtures("float64")

CASES = json.loads((Path(__file__).parents[1] / "data" / "nist.json").read_text(encoding="utf-8"))["cases"]
NAMES = [case["name"] for case in CASES]
SOLVERS = [
    "torch.levenberg_marquardt",
    "torch.gauss_newton",
    "torch.dogleg",
    pytest.param("scipy.least_squares", marks=pytest.mark.plugin("invlayer-scipy")),
]
TOLERANCE = {"Bennett5": 1e-6}  # relative; its Hessian leaves no more digits


def numbers(values: list[Any]) -> Tensor:
    return torch.tensor([[float(v) for v in row] if isinstance(row, list) else float(row) for row in values])


def residuals_of(case: dict[str, Any]) -> Callable[..., Tensor]:
    """The model minus the data, compiled from the formula."""
    functions = {name: getattr(torch, name) for name in ("exp", "log", "sin", "cos", "atan", "sqrt", "pi")}
    formula = compile(case["model"], case["name"], "eval")

    def residuals(b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parameters = dict(zip(case["params"], b.unsqueeze(-1).unbind(-2), strict=True))
        predictors = dict(zip(case["predictors"], x.unbind(-1), strict=True))
        return eval(formula, functions | parameters | predictors) - y

    return residuals


def data_of(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    y = numbers(case["y"])
    return numbers(case["x"]), y.log() if case["response"] == "log(y)" else y


def fitted(case: dict[str, Any], **keywords: Any) -> tuple[Tensor, Tensor, inv.SolveInfo]:
    x, y = data_of(case)
    y.requires_grad_()
    start = numbers(case["start2"])
    b, info = inv.least_squares(
        residuals_of(case), start, (x, y), polish="auto", return_info=True, **keywords
    )
    return b, y, info


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NAMES)
def test_fit_and_derivative(name: str, solver: str) -> None:
    case = CASES[NAMES.index(name)]
    b, y, _ = fitted(case, solver=solver)
    torch.testing.assert_close(b.detach(), numbers(case["refined_params"]), rtol=1e-8, atol=0)
    found = torch.stack([torch.autograd.grad(each, y, retain_graph=True)[0] for each in b])
    exact = numbers(case["db_dy"])
    worst = ((found - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert float(worst) < TOLERANCE.get(name, 1e-8)


def test_gauss_newton_step_is_off_by_half() -> None:
    """MGH09: what a linearised step without second derivatives gives, as its name says."""
    case = CASES[NAMES.index("MGH09")]
    adjoint = DLM(1e-8, central=True, hessian="gauss_newton")
    b, y, _ = fitted(case, solver="torch.levenberg_marquardt", adjoint=adjoint)
    found = torch.stack([torch.autograd.grad(each, y, retain_graph=True)[0] for each in b])
    exact = numbers(case["db_dy"])
    gap = float((found - exact).norm() / exact.norm())
    assert abs(gap - float(case["gauss_newton_db_dy_rel_frobenius_gap"])) < 1e-3
    assert gap > 0.5


def test_all_in_one_batch() -> None:
    """Both starts of Misra1a, the certified parameters and a hopeless start, as four samples."""
    case = CASES[NAMES.index("Misra1a")]
    x, y = data_of(case)
    rows = [numbers(case[key]) for key in ("start1", "start2", "refined_params")]
    start = torch.stack([*rows, torch.tensor([1e300, -1e300])])
    b, info = inv.least_squares(
        residuals_of(case), start, (x, y), return_info=True, on_failure="nan", polish="auto"
    )
    assert info.ok.tolist() == [True, True, True, False]
    torch.testing.assert_close(b[:3], rows[2].expand(3, 2), rtol=1e-9, atol=0)
