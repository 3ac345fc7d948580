"""Published constrained problems: dx/dp and dλ/dp against 25-digit references.

``data/hs.json`` holds problems of Hock & Schittkowski (1981) and an isotonic regression from the manual
of R's isoreg. Values agree with the printed ones; derivatives come from computer algebra at 60 digits, of the
KKT system with the printed active set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

DATA = json.loads((Path(__file__).parents[1] / "data" / "hs.json").read_text())["cases"]
NAMESPACE: dict[str, Any] = {"__builtins__": {}, "exp": torch.exp, "log": torch.log}
NUMBERS = {"__builtins__": {}, "sqrt": math.sqrt}


@dataclass(frozen=True)
class Case:
    data: dict[str, Any]

    @property
    def name(self) -> str:
        return self.data["name"]

    @cached_property
    def params(self) -> Tensor:
        return torch.tensor([float(eval(text, NUMBERS)) for text in self.data["param_values"]])

    @cached_property
    def solution(self) -> Tensor:
        return torch.tensor([float(text) for text in self.data["x_star"]])

    @cached_property
    def start(self) -> Tensor:
        return torch.tensor([float(eval(text, NUMBERS)) for text in self.data["start"]])

    def table(self, name: str) -> Tensor:
        return torch.tensor([[float(entry) for entry in row] for row in self.data[name]])

    def function(self, texts: list[str]) -> Callable[[Tensor, Tensor], Tensor] | None:
        if not texts:
            return None
        compiled = [compile(text, self.name, "eval") for text in texts]

        def function(y: Tensor, p: Tensor) -> Tensor:
            values = dict(zip(self.data["vars"], y.unbind(-1), strict=True))
            values |= dict(zip(self.data["params"], p.unbind(-1), strict=True))
            rows = [torch.as_tensor(eval(code, NAMESPACE, values)).expand(y.shape[:-1]) for code in compiled]
            return torch.stack(rows, -1)

        return function

    def objective(self, y: Tensor, p: Tensor) -> Tensor:
        function = self.function([self.data["objective"]])
        assert function is not None
        return function(y, p).squeeze(-1)

    def solve(self, p: Tensor, **keywords: Any) -> Any:
        return inv.nlp(
            self.objective,
            self.start.expand(*p.shape[:-1], -1),
            p,
            eq=self.function(self.data["eq"]),
            ineq=self.function(self.data["ineq_ge0"]),
            **keywords,
        )


CASES = [Case(data) for data in DATA]
REGULAR = [case for case in CASES if case.data["degenerate"] is None]
of_case = pytest.mark.parametrize("case", REGULAR, ids=lambda case: case.name)


def near(case: Case, error: float = 1e-5) -> Callable[..., Tensor]:
    """An opaque solver that stops a little beside the solution, as solvers do."""

    def solve(y0: np.ndarray, p: np.ndarray) -> np.ndarray:
        wave = np.cos(3.0 * np.arange(case.solution.numel()))
        return case.solution.numpy() + error * wave + 0 * y0

    return inv.from_numpy(solve)


SOLVERS = [
    pytest.param("near", id="opaque"),
    pytest.param("slsqp", marks=pytest.mark.plugin("invlayer-scipy")),
    pytest.param("trust-constr", marks=[pytest.mark.plugin("invlayer-scipy"), pytest.mark.slow]),
]


def keywords_of(case: Case, solver: str) -> dict[str, Any]:
    if solver == "near":
        return {"solver": near(case), "rtol": 1e-3}
    return {"solver": "scipy.minimize", "options": {"method": solver}, "rtol": 1e-4}


@of_case
@pytest.mark.parametrize("solver", SOLVERS)
def test_solution_and_its_derivative(case: Case, solver: str) -> None:
    p = case.params.clone().requires_grad_()
    y = case.solve(p, **keywords_of(case, solver))
    torch.testing.assert_close(y.detach(), case.solution, rtol=1e-8, atol=1e-8)
    jacobian = torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in y])
    expected = case.table("dx_dparams")
    torch.testing.assert_close(jacobian, expected, rtol=1e-8, atol=1e-8 * float(1 + expected.abs().max()))


@of_case
def test_multipliers_and_their_derivative(case: Case) -> None:
    p = case.params.clone().requires_grad_()
    _, multipliers = case.solve(p, solver=near(case), rtol=1e-3, return_multipliers=True)
    expected = [float(text) for text in case.data["eq_multipliers"]]
    torch.testing.assert_close(
        multipliers.equalities.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )
    found = [*multipliers.equalities, *(multipliers.inequalities[i] for i in case.data["active_set"])]
    jacobian = torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in found])
    reference = case.table("dmultipliers_dparams")
    torch.testing.assert_close(jacobian, reference, rtol=1e-8, atol=1e-8 * float(1 + reference.abs().max()))
    for i, entry in enumerate(multipliers.inequalities):
        value = float(case.data["ineq_multipliers"].get(str(i), 0.0))
        assert entry.item() == pytest.approx(value, rel=1e-8, abs=1e-8)


@of_case
def test_active_set_is_the_published_one(case: Case) -> None:
    _, info = case.solve(case.params, solver=near(case), rtol=1e-3, return_info=True)
    equalities = len(case.data["eq"])
    active = info.constraints.active[equalities:].nonzero().reshape(-1).tolist()
    assert active == sorted(case.data["active_set"])
    assert bool(info.constraints.active[:equalities].all())
    assert not bool(info.constraints.weakly_active.any())
    assert bool(info.constraints.independent)


@pytest.mark.parametrize(
    "case", [case for case in REGULAR if case.name in ("HS012", "HS071")], ids=lambda case: case.name
)
def test_objective_in_other_units(case: Case) -> None:
    """The active set does not depend on the scale of the objective, whose multipliers shrink with it."""
    p = case.params.clone().requires_grad_()
    y = inv.nlp(
        lambda y, p: 1e-8 * case.objective(y, p),
        case.start,
        p,
        eq=case.function(case.data["eq"]),
        ineq=case.function(case.data["ineq_ge0"]),
        solver=near(case, 1e-7),
    )
    jacobian = torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in y])
    torch.testing.assert_close(jacobian, case.table("dx_dparams"), rtol=1e-6, atol=1e-6)


def test_flat_minimum_is_named() -> None:
    """HS026 has a quartic valley: no derivative follows from its KKT conditions."""
    (case,) = [case for case in CASES if case.data["degenerate"] == "singular_kkt"]
    p = case.params.clone().requires_grad_()
    y = case.solve(p, solver=near(case, 0.0))
    with pytest.raises(inv.SingularJacobianError, match="singular at the solution of sample 0"):
        y[0].backward()


@pytest.mark.parametrize(
    "case", [case for case in REGULAR if case.name in ("HS035", "HS071")], ids=lambda case: case.name
)
def test_batch_is_as_samples_alone(case: Case) -> None:
    shift = 1 + 1e-3 * torch.arange(3.0).unsqueeze(-1)
    p = (case.params * shift).requires_grad_()
    keywords: dict[str, Any] = {"solver": near(case, 0.0), "rtol": 1e-2, "polish": 10}
    together = case.solve(p, **keywords)
    alone = torch.stack([case.solve(row, **keywords) for row in p])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    (of_together,) = torch.autograd.grad(together.sum(), p)
    (of_alone,) = torch.autograd.grad(alone.sum(), p)
    torch.testing.assert_close(of_together, of_alone, rtol=1e-9, atol=1e-9)
