"""Published systems of equations: value and gradient against 40-digit references.

``data/mgh.json`` holds the problems of Moré, Garbow & Hillstrom (1981), ``data/apps.json`` those of orbits,
options, pipes, gases, cameras, robots and power networks; each case names its source. The references are
derivatives by computer algebra, evaluated at 60 digits; the conditions here are the same formulas in torch.

The root is perturbed by 1e-3 of its size, so that every solver finds the stored one among several.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

DATA = Path(__file__).parent / "data"
# Relative error of value and gradient. 1e-8 is what is asked; what a solver reaches here, with its default
# options and a factor of about 20 to spare, is nearer. Half of the 62 cases are at 1e-15.
ASKED = 1e-8
REACHED = {"torch.newton": 1e-11, "scipy.root": 3e-10}
PERTURBATION = 1e-3


def _lift(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a torch function take plain numbers, as in ``sqrt(5)``."""
    return lambda *args: function(*(torch.as_tensor(arg, dtype=torch.float64) for arg in args))


_TORCH_NAMES = (
    *("exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
    *("sinh", "cosh", "tanh", "sqrt", "erf", "erfc"),
)
NAMESPACE: dict[str, Any] = {name: _lift(getattr(torch, name)) for name in _TORCH_NAMES}
NAMESPACE |= {"pi": math.pi, "Rational": operator.truediv, "__builtins__": {}}


def evaluate(text: str | CodeType, values: dict[str, Any]) -> Any:
    return eval(text, NAMESPACE, values)


def number(text: str) -> Tensor:
    return torch.as_tensor(evaluate(text, {}), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One system F(y, p) = 0, formulas as text."""

    name: str
    vars: list[str]
    params: list[str]
    param_values: list[str]
    residual: list[str]
    root: list[str]
    singular: bool
    dy_dparams: list[list[str]] | None

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Case:
        return cls(**{name: entry[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        return self.name

    @cached_property
    def _compiled(self) -> list[CodeType]:
        return [compile(text, self.name, "eval") for text in self.residual]

    def conditions(self, y: Tensor, p: Tensor) -> Tensor:
        names = dict(zip(self.vars, y.unbind(-1), strict=True)) | dict(
            zip(self.params, p.unbind(-1), strict=True)
        )
        return torch.stack([evaluate(code, names) for code in self._compiled], -1)

    def p(self) -> Tensor:
        return torch.stack([number(text) for text in self.param_values])

    def y(self) -> Tensor:
        return torch.stack([number(text) for text in self.root])

    def near(self) -> Tensor:
        """The root, perturbed by a seeded 1e-3 of each unknown (of the largest where one is zero)."""
        y = self.y()
        scale = torch.where(y == 0, y.abs().max(), y.abs())
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        generator = torch.Generator().manual_seed(7)
        return y + PERTURBATION * scale * (2 * torch.rand(y.shape, generator=generator) - 1)

    def gradient(self) -> Tensor:
        assert self.dy_dparams is not None
        return torch.tensor([[float(entry) for entry in row] for row in self.dy_dparams])


CASES = [
    Case.of(entry)
    for file in ("mgh.json", "apps.json")
    for entry in json.loads((DATA / file).read_text(encoding="utf-8"))["cases"]
]
REGULAR = [case for case in CASES if not case.singular]
SINGULAR = [case for case in CASES if case.singular]

SOLVERS = pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.root", marks=pytest.mark.plugin("invlayer-scipy"))]
)


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def worst_row(ours: Tensor, reference: Tensor) -> float:
    """The largest error of one unknown's gradient, relative to that gradient."""
    return max(relative(one, other) for one, other in zip(ours, reference, strict=True))


def jacobian(y: Tensor, p: Tensor) -> Tensor:
    return torch.autograd.grad(y, p, torch.eye(y.numel()), is_grads_batched=True)[0]


def test_all_cases_are_here() -> None:
    assert (len(REGULAR), len(SINGULAR)) == (62, 3)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_root_solves_the_system(case: Case) -> None:
    """A check of the formulas as they are read here: F vanishes to the rounding of its terms."""
    y, p = case.y(), case.p()
    terms = torch.func.jacrev(case.conditions, argnums=(0, 1))(y, p)
    scale = sum((part.abs() @ value.abs()) for part, value in zip(terms, (y, p), strict=True))
    assert bool((case.conditions(y, p).abs() <= 1e-13 * (1 + scale)).all())


@SOLVERS
@pytest.mark.parametrize("case", REGULAR, ids=str)
def test_value_and_gradient(case: Case, solver: str) -> None:
    p = case.p().requires_grad_()
    y = inv.root(case.conditions, case.near(), args=p, solver=solver)
    ours, reference = jacobian(y, p), case.gradient()
    tolerance = REACHED[solver]
    assert tolerance < ASKED
    assert relative(y.detach(), case.y()) <= tolerance
    assert relative(ours, reference) <= tolerance
    assert worst_row(ours, reference) <= tolerance


@SOLVERS
@pytest.mark.parametrize("case", SINGULAR, ids=str)
def test_singular_root_has_no_gradient(case: Case, solver: str) -> None:
    p = case.p().requires_grad_()
    y = inv.root(case.conditions, case.near(), args=p, solver=solver)
    with pytest.raises(inv.SingularJacobianError, match="singular at the solution of sample 0"):
        y.sum().backward()


@SOLVERS
@pytest.mark.parametrize("case", SINGULAR, ids=str)
def test_singular_root_has_a_least_squares_answer(case: Case, solver: str) -> None:
    p = case.p().requires_grad_()
    adjoint = inv.adjoints.Implicit(singular="lstsq")
    y = inv.root(case.conditions, case.near(), args=p, solver=solver, adjoint=adjoint)
    rows = [torch.autograd.grad(y, p, unit, retain_graph=True)[0] for unit in torch.eye(y.numel())]
    ours, (of_y, of_p) = torch.stack(rows), torch.func.jacrev(case.conditions, (0, 1))(case.y(), case.p())
    expected = -torch.linalg.pinv(of_y, atol=1e-6, rtol=1e-6) @ of_p
    # y* itself is only known to the square root of rounding.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_least_squares_answer_for_batched_cotangents() -> None:
    (case,) = [case for case in SINGULAR if case.name == "ik_2R_singular"]
    p = case.p().requires_grad_()
    y = inv.root(case.conditions, case.near(), args=p, adjoint=inv.adjoints.Implicit(singular="lstsq"))
    (first,) = torch.autograd.grad(y[0], p, retain_graph=True)
    assert torch.equal(jacobian(y, p)[0], first)


def test_numbers_are_read_as_fractions_are() -> None:
    """``1/100`` by the reader is the double next to 1/100."""
    assert float(number("1/100")) == float(Fraction(1, 100))
