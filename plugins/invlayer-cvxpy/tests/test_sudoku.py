"""OptNet's 4 × 4 Sudoku (Amos & Kolter 2017): a quadratic program whose constraints are learned.

The true constraints, 64 rows of rank 40, make the KKT system singular and the solution a vertex: every
gradient below exists all the same.
"""

import json
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from invlayer_cvxpy import CvxpyLayer

DATA = json.loads((Path(__file__).parent / "data" / "sudoku.json").read_text(encoding="utf-8"))
EPSILON = 0.1


def one_hot(grid: list[list[int]]) -> Tensor:
    """Row, column, digit: a cube of 64 entries; zeros where the digit is unknown."""
    return torch.cat([torch.eye(5)[digit][1:] for row in grid for digit in row]).double()


def constraints() -> np.ndarray:
    """Every cell, row, column and block holds each digit once: 64 rows."""
    cube = np.zeros((64, 4, 4, 4))
    sets = [(i, j, slice(None)) for i in range(4) for j in range(4)]
    sets += [(i, slice(None), k) for i in range(4) for k in range(4)]
    sets += [(slice(None), j, k) for j in range(4) for k in range(4)]
    blocks = [slice(0, 2), slice(2, 4)]
    sets += [(rows, cols, k) for rows in blocks for cols in blocks for k in range(4)]
    for row, index in zip(cube, sets, strict=True):
        row[index] = 1.0
    return cube.reshape(64, 64)


def true_layer(**keywords: object) -> CvxpyLayer:
    z, p = cp.Variable(64), cp.Parameter(64)
    problem = cp.Problem(
        cp.Minimize(EPSILON / 2 * cp.sum_squares(z) - p @ z), [constraints() @ z == 1, z >= 0]
    )
    return CvxpyLayer(problem, [p], [z], **keywords)


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp"])
def test_the_layer_solves_the_puzzles(solver: str) -> None:
    puzzles = torch.stack([one_hot(case["givens"]) for case in DATA["cases"]]).requires_grad_()
    (found,) = true_layer(solver=solver)(puzzles)
    published = torch.stack([one_hot(case["solution"]) for case in DATA["cases"]])
    assert (found - published).abs().max() < 1e-8
    (gradient,) = torch.autograd.grad((found * torch.randn(64)).sum(), puzzles)
    assert gradient.abs().max() < 1e-6  # a vertex stays where it is


@pytest.mark.parametrize("case", DATA["fractional_cases"], ids=lambda case: case["name"])
def test_derivatives_where_the_solution_is_no_vertex(case: dict) -> None:
    puzzle, free = one_hot(case["givens"]), case["free_set"]
    (found,) = true_layer()(puzzle)
    torch.testing.assert_close(found, torch.tensor(case["z_star"]), rtol=0, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda p: true_layer()(p)[0], puzzle)
    torch.testing.assert_close(jacobian[free][:, free], torch.tensor(case["dzF_dpF"]), rtol=0, atol=1e-6)


def test_optnet_learns_the_rules() -> None:
    """A and z₀ of A z = A z₀ are learned from solved puzzles by gradient descent through the program."""
    z, p, A, b = cp.Variable(64), cp.Parameter(64), cp.Parameter((40, 64)), cp.Parameter(40)
    problem = cp.Problem(cp.Minimize(EPSILON / 2 * cp.sum_squares(z) - p @ z), [A @ z == b, z >= 0])
    layer = CvxpyLayer(problem, [p, A, b], [z])
    puzzles = torch.stack([one_hot(case["givens"]) for case in DATA["cases"]])
    solutions = torch.stack([one_hot(case["solution"]) for case in DATA["cases"]])
    rules = torch.rand(40, 64).requires_grad_()
    point = torch.full((64,), 0.25).log().requires_grad_()
    optimiser = torch.optim.Adam([rules, point], lr=0.1)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        (found,) = layer(puzzles, rules, rules @ point.exp())
        loss = (found - solutions).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
