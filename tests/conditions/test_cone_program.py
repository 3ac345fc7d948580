"""The conditions of a cone program and the kind ``cone_program``, with a solver made for the tests."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.conditions.cone import ConeConditions
from invlayer_core.conditions.cone_jacobian import ConeJacobian

F64 = torch.float64


class Newton(inv.Solver):
    """Projected gradients on the dual, then Newton on F: enough for strictly convex programs of this size."""

    def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
        z = dual_ascent(problem)
        for k in range(20):
            value = problem.residual(z)
            if np.abs(value).max() < 1e-12:
                return inv.SolverResult(z, True, k)
            z = z - np.linalg.solve(problem.jacobian(z), value)
        return inv.SolverResult(z, False, 20, "no luck")


def dual_ascent(problem: inv.ConeProblem, steps: int = 100) -> np.ndarray:
    """y ← Π_K*(y + t (A x − b)) with x = −P⁻¹ (q + Aᵀy)."""
    n, m = problem.structure.size, problem.structure.equations
    upper, A = np.zeros((n, n)), np.zeros((m, n))
    upper[tuple(index.numpy() for index in problem.structure.P)] = problem.P
    A[tuple(index.numpy() for index in problem.structure.A)] = problem.A
    inverse = np.linalg.inv(upper + upper.T - np.diag(upper.diagonal()))
    step, y, v = 1.0 / max(np.linalg.norm(A @ inverse @ A.T, 2), 1e-9), np.zeros(m), np.zeros(m)
    for _ in range(steps):
        x = -inverse @ (problem.q + A.T @ y)
        v = y + step * (A @ x - problem.b)
        y = problem.structure.cones.project_dual(torch.from_numpy(v)).numpy()
    return np.concatenate([x, y - (y - v) / step])


CONES = inv.Cones(zero=1, nonneg=2, soc=(3,), psd=(2,))


def program(batch: tuple[int, ...] = (), seed: int = 0) -> tuple[inv.ConeStructure, list[Tensor]]:
    """min ½‖x‖² + qᵀx s.t. A x + s = b, with s = b − A x strictly feasible at 0."""
    structure = inv.ConeStructure.dense(4, CONES)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    rows, cols = structure.P
    P = (rows == cols).to(F64) + 0.1 * draw(*batch, len(rows)) * (rows != cols)
    inner = torch.tensor([0.0, 0.5, 0.5, 1.0, 0, 0, 0.5, 0, 0.5], dtype=F64)
    return structure, [P, 2 * draw(*batch, 4), draw(len(structure.A[0])), inner]


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_the_solution_satisfies_the_definition(batch: tuple[int, ...]) -> None:
    structure, (P, q, A, b) = program(batch)
    x, y, s = inv.cone_program(P, q, A, b, structure, solver=Newton())
    matrix = A.reshape(9, 4)
    upper = torch.zeros(*batch, 4, 4, dtype=F64)
    upper[..., structure.P[0], structure.P[1]] = P
    hessian = upper + upper.mT - torch.diag_embed(upper.diagonal(dim1=-2, dim2=-1))
    assert x.shape == (*batch, 4)
    torch.testing.assert_close((hessian @ x.unsqueeze(-1)).squeeze(-1) + q + y @ matrix, torch.zeros_like(x))
    torch.testing.assert_close(x @ matrix.T + s, b.expand_as(s))
    assert (y * s).sum(-1).abs().max() < 1e-12
    assert s[..., 0].abs().max() < 1e-14
    assert min(s[..., 1:3].min(), y[..., 1:3].min()) >= 0
    for part in (s[..., 3:6], y[..., 3:6]):
        assert (part[..., 0] - part[..., 1:].norm(dim=-1)).min() > -1e-13


def test_gradients_of_everything_by_everything() -> None:
    structure, tensors = program()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    solve = lambda *t: tuple(inv.cone_program(*t, structure, solver=Newton()))  # noqa: E731
    assert torch.autograd.gradcheck(solve, tensors, atol=1e-7, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, tensors, atol=1e-6, fast_mode=True)


def test_against_an_unrolled_newton() -> None:
    structure, tensors = program()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    x, y, s = inv.cone_program(*tensors, structure, solver=Newton())
    z = torch.cat([x, y - s]).detach()
    F, J = ConeConditions(structure), ConeJacobian(structure)
    for _ in range(3):
        z = z - torch.linalg.solve(J(z, *tensors), F(z, *tensors))
    weights = torch.linspace(-1, 1, 4, dtype=F64)
    ours = torch.autograd.grad((weights * x).sum(), tensors, create_graph=True)
    theirs = torch.autograd.grad((weights * z[:4]).sum(), tensors, create_graph=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
    second = [torch.autograd.grad(sum(g.sin().sum() for g in first), tensors) for first in (ours, theirs)]
    for mine, other in zip(*second, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def test_the_jacobian_is_that_of_the_conditions() -> None:
    cones = inv.Cones(zero=1, nonneg=2, soc=(3, 2, 3), psd=(3,), exp=2, power=(0.3, 0.6))
    structure = inv.ConeStructure.dense(3, cones)
    draw = lambda *shape: torch.randn(*shape, dtype=F64)  # noqa: E731
    z, P, q = draw(4, 3 + cones.size), draw(4, 6), draw(3)
    A, b = draw(3 * cones.size), draw(4, cones.size)
    by_autograd = torch.func.vmap(torch.func.jacrev(ConeConditions(structure)), in_dims=(0, 0, None, None, 0))
    found = ConeJacobian(structure)(z, P, q, A, b)
    torch.testing.assert_close(found, by_autograd(z, P, q, A, b), rtol=0, atol=1e-13)


def large_structure() -> inv.ConeStructure:
    """Enough unknowns, and few enough non-zeros, for the Jacobian to be given by its entries."""
    cones = inv.Cones(zero=40, nonneg=60, soc=(3, 2, 3), psd=(3,), exp=10, power=(0.3, 0.6))
    generator = torch.Generator().manual_seed(0)
    places = torch.unique(torch.randint(0, cones.size * 80, (400,), generator=generator))
    line = torch.arange(80)
    tridiagonal = torch.cat([line, line[:-1]]), torch.cat([line, line[1:]])
    return inv.ConeStructure(80, cones, tridiagonal, (places // 80, places % 80))


def test_the_entries_of_the_jacobian_are_those_of_its_blocks() -> None:
    structure = large_structure()
    assert structure.places is not None
    draw = lambda *shape: torch.randn(*shape, dtype=F64)  # noqa: E731
    m = structure.equations
    z, P, q = draw(2, 80 + m), draw(len(structure.P[0])), draw(80)
    A, b = draw(2, len(structure.A[0])), draw(m)
    jacobian = ConeJacobian(structure)
    whole = torch.zeros(2, 80 + m, 80 + m, dtype=F64)
    whole[:, structure.places[0], structure.places[1]] = jacobian.entries(z, P, q, A, b)
    torch.testing.assert_close(whole, jacobian(z, P, q, A, b), rtol=0, atol=1e-13)
    pattern = inv.jacobians.SparsityPattern(*structure.places, (80 + m, 80 + m))
    assert torch.equal(pattern.rows, structure.places[0])  # the order of one is that of the other
    assert torch.equal(pattern.cols, structure.places[1])


def test_torch_func() -> None:
    structure, (P, q, A, b) = program((3,))
    solve = lambda P, q: inv.cone_program(P, q, A, b, structure, solver=Newton()).x  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(solve)(P, q), solve(P, q), rtol=0, atol=1e-14)
    shared = torch.func.vmap(solve, in_dims=(None, 0))(P[0], q)
    torch.testing.assert_close(shared, solve(P[0], q), rtol=0, atol=1e-14)
    jacobian = torch.func.vmap(torch.func.jacrev(solve, argnums=1))(P, q)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(solve, argnums=1))(P, q), jacobian)
    for i in range(3):
        rows = torch.autograd.functional.jacobian(lambda q, i=i: solve(P[i], q), q[i])
        torch.testing.assert_close(jacobian[i], rows, rtol=0, atol=1e-12)


def test_vmap_over_what_the_batch_shares() -> None:
    """Mapped tensors without batch dims beside batched ones that are not mapped."""
    structure, (P, q, A, b) = program((3,))
    scales = torch.tensor([1.0, 1.5], dtype=F64)
    solve = lambda scale: inv.cone_program(P, q, A, scale * b, structure, solver=Newton()).x  # noqa: E731
    expected = torch.stack([solve(scale) for scale in scales])
    torch.testing.assert_close(torch.func.vmap(solve)(scales), expected, rtol=0, atol=1e-13)


def test_float32_is_solved_in_float64() -> None:
    structure, tensors = program((2,))
    exact = inv.cone_program(*tensors, structure, solver=Newton())
    found = inv.cone_program(*(t.float().requires_grad_() for t in tensors), structure, solver=Newton())
    assert found.x.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), exact.x, rtol=0, atol=1e-5)


def test_threads_and_serial_agree() -> None:
    structure, tensors = program((5,))
    one = inv.cone_program(*tensors, structure, solver=Newton())
    two = inv.cone_program(*tensors, structure, solver=Newton(), workers=3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_false_claim_is_measured() -> None:
    class Liar(inv.Solver):
        def solve(self, problem: inv.ConeProblem, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
            return inv.SolverResult(np.ones(problem.size), True, 1)

    structure, tensors = program((2,))
    with pytest.raises(inv.ConvergenceError, match="FALSE_CONVERGENCE"):
        inv.cone_program(*tensors, structure, solver=Liar(), polish=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5)}, r"q has shape \(5,\); accepted is \(\*batch, 4\)"),
        ({"b": torch.zeros(2, 8)}, r"b has shape \(2, 8\)"),
        ({"A": torch.zeros(36, dtype=torch.int64)}, "(?s)A is tensor.*accepted is a real tensor"),
        ({"event_dims": 1}, "event_dims= has no meaning here"),
        ({"solver": "scipy.fsolve"}, "that solver is for root, fixed_point"),
    ],
)
@pytest.mark.plugin("invlayer-scipy")
def test_bad_input(change: dict[str, Any], message: str) -> None:
    structure, (P, q, A, b) = program()
    arguments: dict[str, Any] = {"P": P, "q": q, "A": A, "b": b, "solver": Newton(), **change}
    with pytest.raises(inv.ConditionsError, match=message):
        inv.cone_program(structure=structure, **arguments)


def test_bad_structures() -> None:
    index = torch.tensor([1]), torch.tensor([0])
    with pytest.raises(inv.ConditionsError, match="below its diagonal"):
        inv.ConeStructure(2, inv.Cones(nonneg=1), index, (torch.zeros(0).long(),) * 2)
    with pytest.raises(inv.ConditionsError, match="A has indices from 1 to 1; accepted are 0 to 0"):
        inv.ConeStructure(2, inv.Cones(nonneg=1), (torch.zeros(0).long(),) * 2, index)
