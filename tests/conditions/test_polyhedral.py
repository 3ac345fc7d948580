"""Cone programs without a curved cone, by the active set of the quadratic programs that they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.conditions.test_cone_program import dual_ascent
from torch import Tensor

import invlayer_core as inv

F64 = torch.float64
CONES = inv.Cones(zero=1, nonneg=4)
GENERAL = inv.adjoints.Implicit(linear_solver=inv.linear.LU())
"""By the Jacobian of the residual map, as for curved cones."""


class Ascent(inv.Solver):
    """Projected gradients on the dual; a b of NaN it calls infeasible."""

    def __init__(self, steps: int = 400) -> None:
        self.steps = steps

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        if not np.isfinite(problem.b).all():
            return inv.SolverResult(np.full(problem.size, np.nan), False, no_solution=True)
        return inv.SolverResult(dual_ascent(problem, self.steps), True, self.steps)


def program(batched: str = "q", cones: inv.Cones = CONES) -> tuple[inv.ConeStructure, list[Tensor]]:
    """min ½ xᵀP x + qᵀx s.t. A x + s = b, with some of the inequalities active."""
    structure, n = inv.ConeStructure.dense(3, cones), 3
    generator = torch.Generator().manual_seed(3)

    def draw(name: str, size: int) -> Tensor:
        return torch.randn(*((4,) if name in batched else ()), size, generator=generator, dtype=F64)

    rows, cols = structure.P
    P = 2.0 * (rows == cols) + 0.2 * draw("P", len(rows))
    eye = torch.eye(n, dtype=F64)
    A = torch.cat([eye, -eye])[: cones.size].reshape(-1) + 0.2 * draw("A", n * cones.size)
    b = 0.1 + 0.2 * draw("b", cones.size).abs()
    return structure, [P, draw("q", n) - 2.0, A, b]


def solved(structure: inv.ConeStructure, tensors: list[Tensor], **keywords: Any) -> Any:
    return inv.cone_program(*tensors, structure, solver=Ascent(), **keywords)


@pytest.mark.parametrize("batched", ["", "q", "P", "A b", "P q A b"])
@pytest.mark.parametrize("cones", [CONES, inv.Cones(zero=2), inv.Cones(nonneg=4), inv.Cones()])
def test_same_derivatives_as_the_residual_map(cones: inv.Cones, batched: str) -> None:
    structure, tensors = program(batched, cones)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    results = []
    for keywords in ({}, {"adjoint": GENERAL}):
        x, y, s = solved(structure, tensors, **keywords)
        value = (x.sin() * torch.arange(3)).sum() + y.cos().sum() + (s * torch.arange(cones.size)).sin().sum()
        first = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), tensors, materialize_grads=True)
        results.append((x, y, s, *first, *second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert not cones.nonneg or (results[0][1] > 1e-3).any()  # something is active


def test_gradients_against_differences() -> None:
    structure, tensors = program("q b")
    tensors = [tensor.requires_grad_() for tensor in tensors]
    solve = lambda *t: tuple(solved(structure, list(t)))  # noqa: E731
    assert torch.autograd.gradcheck(solve, tensors, atol=1e-8, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, tensors, atol=1e-6, fast_mode=True)


def test_torch_func() -> None:
    structure, (P, q, A, b) = program("q")
    f = lambda q, A: (lambda found: found.x.sin().sum() + (found.y * found.s.cos()).sum())(  # noqa: E731
        solved(structure, [P, q, A, b])
    )
    plain = [q.clone().requires_grad_(), A.clone().requires_grad_()]
    exact = torch.autograd.grad(f(*plain), plain)
    for ours, theirs in zip(torch.func.grad(f, (0, 1))(q, A), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    rows = torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(q, A)
    torch.testing.assert_close(rows, exact[0], rtol=0, atol=1e-12)
    reverse, forward = torch.func.jacrev(f)(q[0], A), torch.func.jacfwd(f)(q[0], A)
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-12)
    hessians = [outer(inner(f))(q[0], A) for outer in (torch.func.jacrev, torch.func.jacfwd)
                for inner in (torch.func.jacrev, torch.func.jacfwd)]  # fmt: skip
    for other in hessians[1:]:
        torch.testing.assert_close(hessians[0], other, rtol=0, atol=1e-9)


def test_vmap_over_each_argument() -> None:
    structure, tensors = program("P q A b")
    whole = solved(structure, tensors)
    for k in range(4):
        shared = [t if i == k else t[0] for i, t in enumerate(tensors)]
        dims = tuple(0 if i == k else None for i in range(4))
        mapped = torch.func.vmap(lambda *t: tuple(solved(structure, list(t))), in_dims=dims)(*shared)
        for ours, theirs in zip(mapped, whole, strict=True):
            torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["nan", "zero_grad"])
@pytest.mark.parametrize("output", ["x", "y", "s"])
def test_a_failed_sample_is_its_own_affair(policy: str, output: str) -> None:
    results = []
    for hurt in (False, True):
        structure, tensors = program("q b")
        if hurt:
            tensors[3][2] = torch.nan
        tensors = [tensor.requires_grad_() for tensor in tensors]
        found = getattr(solved(structure, tensors, on_failure=policy), output)
        gradients = torch.autograd.grad(found.square().sum(), tensors[1], retain_graph=True)[0]
        sound = torch.autograd.grad(found[[0, 1, 3]].square().sum(), tensors)  # of what is shared, too
        results.append((found.detach(), gradients, *sound))
    clean, odd = results
    kept = [0, 1, 3]
    assert torch.equal(clean[0][kept], odd[0][kept])
    assert torch.equal(clean[1][kept], odd[1][kept])
    for ours, theirs in zip(clean[2:], odd[2:], strict=True):
        assert ours.isfinite().all()
        assert torch.equal(torch.nan_to_num(ours), theirs)
    slope = odd[1][2]
    assert slope.isnan().all() if policy == "nan" else bool((slope == 0).all())


def test_what_a_loose_solver_says_is_polished() -> None:
    structure, tensors = program("P q A b")
    loose = inv.cone_program(*tensors, structure, solver=Ascent(40), return_info=True)
    assert loose[1].residual.max() < 1e-13
    assert loose[1].polish.min() >= 1
    assert "active set" in loose[1].linear_solver
    torch.testing.assert_close(loose[0].x, solved(structure, tensors).x, rtol=0, atol=1e-12)
    with pytest.raises(inv.ConvergenceError, match="measured residual"):
        inv.cone_program(*tensors, structure, solver=Ascent(2), polish=0)


def test_one_factorisation_serves_polish_and_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: made.append(1) or factorise(*a, **k))
    structure, tensors = program("q")
    found = solved(structure, [tensor.requires_grad_() for tensor in tensors])
    count = len(made)
    found.x.sum().backward()
    assert count == len(made) == 2


def test_a_solution_at_the_origin() -> None:
    """There x has no size that slacks could be measured by, and P no inverse that would give one."""
    structure = inv.ConeStructure(
        2, inv.Cones(nonneg=2), (torch.tensor([0]), torch.tensor([0])), (torch.arange(2), torch.arange(2))
    )

    class Rough(inv.Solver):
        def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
            return inv.SolverResult(problem.joined(np.full(2, 1e-9), problem.q, np.full(2, 1e-9)), True)

    q = torch.tensor([[1.0, 1.0], [1.0, 0.1]], dtype=F64)
    b = torch.zeros(2, dtype=F64, requires_grad=True)
    for scale in (1.0, 1e-6, 1e6):
        P, A = torch.tensor([2.0], dtype=F64) * scale, -torch.ones(2, dtype=F64)
        x = inv.cone_program(P, q * scale, A, b, structure, solver=Rough()).x
        assert x.abs().max() < 1e-15
        torch.testing.assert_close(torch.autograd.grad(x.sum(), b)[0], torch.full_like(b, -2.0))


def test_dependent_constraints() -> None:
    """Their multipliers are not unique, x is, and so is its gradient."""
    structure = inv.ConeStructure.dense(2, inv.Cones(nonneg=2))
    P, A = torch.tensor([1.0, 0.0, 1.0], dtype=F64), torch.ones(4, dtype=F64)
    q, b = torch.tensor([-2.0, -3.0], dtype=F64, requires_grad=True), torch.ones(2, dtype=F64)
    x, y, _ = solved(structure, [P, q, A, b], adjoint=inv.adjoints.Implicit(singular="consistent"))
    torch.testing.assert_close(x, torch.tensor([0.0, 1.0], dtype=F64))
    slope = torch.autograd.grad(x[0], q, retain_graph=True)[0]
    torch.testing.assert_close(slope, torch.tensor([-0.5, 0.5], dtype=F64))
    with pytest.raises(inv.SingularJacobianError, match="depend on each other"):
        y[0].backward()
