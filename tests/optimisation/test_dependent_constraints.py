"""Constraints that depend on each other: the derivative of y is defined, the multipliers are not.

``data/sudoku.json`` holds 4×4 mini-Sudokus of the OptNet paper (Amos & Kolter 2017; from locuslab/optnet)
as quadratic programs

    min 0.05 ‖z‖² − pᵀz   such that   A z = 1,  z ≥ 0,

where A says that every cell, row, column and block holds each digit once: 64 equations of rank 40. At a
solved puzzle z is a vertex, and its derivative zero; the "fractional" ones have optima inside a face, and
derivatives from the projection onto it, computed with 40 digits.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

DATA = json.loads((Path(__file__).parents[1] / "data" / "sudoku.json").read_text())


def constraint_matrix() -> Tensor:
    """Cells, rows, columns and blocks, each of which holds a digit once: (64, 64)."""
    rows = []
    everything = slice(None)
    for i, j in itertools.product(range(4), range(4)):
        rows.append((i, j, everything))
    for digit in range(4):
        rows += [(i, everything, digit) for i in range(4)]
        rows += [(everything, j, digit) for j in range(4)]
        rows += [(slice(i, i + 2), slice(j, j + 2), digit) for i in (0, 2) for j in (0, 2)]
    A = torch.zeros(64, 4, 4, 4)
    for row, index in zip(A, rows, strict=True):
        row[index] = 1.0
    return A.reshape(64, 64)


def one_hot(digits: list[list[int]]) -> Tensor:
    z = torch.zeros(4, 4, 4)
    for i, j in itertools.product(range(4), range(4)):
        if digits[i][j]:
            z[i, j, digits[i][j] - 1] = 1.0
    return z.reshape(64)


def solve(p: Tensor, b: Tensor, solution: Tensor, **keywords: Any) -> Any:
    A = constraint_matrix()
    known = inv.from_numpy(lambda y0, p, b: solution.numpy() + 1e-9 * np.cos(np.arange(64.0)))
    return inv.nlp(
        lambda z, p, b: 0.05 * z.square().sum(-1) - (p * z).sum(-1),
        torch.full((64,), 0.25),
        (p, b),
        eq=lambda z, p, b: z @ A.mT - b,
        bounds=(0.0, None),
        solver=known,
        **keywords,
    )


def jacobian(y: Tensor, p: Tensor) -> Tensor:
    return torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in y])


def test_equations_have_rank_40() -> None:
    assert torch.linalg.matrix_rank(constraint_matrix()) == 40


@pytest.mark.parametrize("case", DATA["cases"][:2], ids=lambda case: case["name"])
def test_solved_puzzle_does_not_move(case: dict[str, Any]) -> None:
    p = one_hot(case["givens"]).requires_grad_()
    z = solve(p, torch.ones(64), one_hot(case["solution"]))
    torch.testing.assert_close(z.detach(), one_hot(case["solution"]), rtol=0, atol=1e-8)
    torch.testing.assert_close(jacobian(z, p), torch.zeros(64, 64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", DATA["fractional_cases"], ids=lambda case: case["name"])
def test_fractional_optimum_moves_in_its_face(case: dict[str, Any]) -> None:
    p = one_hot(case["givens"]).requires_grad_()
    solution = torch.tensor([float(entry) for entry in case["z_star"]])
    free = torch.tensor(case["free_set"])
    z, info = solve(p, torch.ones(64), solution, return_info=True)
    assert not bool(info.constraints.independent)
    expected = torch.tensor([[float(entry) for entry in row] for row in case["dzF_dpF"]])
    found = jacobian(z[free], p)
    torch.testing.assert_close(found[:, free], expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    # The same by another way: re-solve by projection onto the face for p moved along one direction.
    A = constraint_matrix()[:, free]
    direction = torch.cos(torch.arange(64.0))
    projector = torch.eye(len(free)) - torch.linalg.pinv(A) @ A
    torch.testing.assert_close(found @ direction, projector @ direction[free] / 0.1, rtol=0, atol=1e-7)


def test_multipliers_of_dependent_equations_are_refused() -> None:
    case = DATA["fractional_cases"][0]
    p = one_hot(case["givens"]).requires_grad_()
    solution = torch.tensor([float(entry) for entry in case["z_star"]])
    _, multipliers = solve(p, torch.ones(64), solution, return_multipliers=True)
    with pytest.raises(inv.SingularJacobianError, match="redundant equations"):
        multipliers.equalities[0].backward()


def test_other_policies_are_at_hand() -> None:
    case = DATA["fractional_cases"][0]
    p = one_hot(case["givens"]).requires_grad_()
    solution = torch.tensor([float(entry) for entry in case["z_star"]])
    z = solve(p, torch.ones(64), solution, adjoint=inv.adjoints.Implicit(singular="raise"))
    with pytest.raises(inv.SingularJacobianError):
        z.sum().backward()
