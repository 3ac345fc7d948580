"""LSMR as a registered linear solver: matrices of any scale, singular ones, and its options."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import invlayer_core as inv
from invlayer_core.linear import SparseMatrix
from invlayer_scipy.lsmr import Lsmr


def as_given(matrix: np.ndarray) -> SparseMatrix:
    A = sp.csc_matrix(matrix)
    return SparseMatrix(A.shape[0], A.indptr, A.indices, A.data, False)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_both_directions_against_numpy(scale: float) -> None:
    draws = np.random.default_rng(0)
    A = draws.standard_normal((30, 30)) * (draws.random((30, 30)) < 0.2) + 3 * np.eye(30)
    A = np.diag(scale ** draws.uniform(-1, 1, 30)) @ A
    b = draws.standard_normal(30)
    factor = Lsmr().factorise(as_given(A), {})
    for found, matrix in ((factor.solve(b), A), (factor.solve_transposed(b), A.T)):
        exact = np.linalg.solve(matrix, b)
        assert np.abs(found - exact).max() < 1e-9 * np.abs(exact).max()


def test_a_singular_matrix_with_a_solution() -> None:
    """The answer solves the system, and is zero in the direction that nothing determines."""
    A = np.diag([2.0, 0.0, 3.0])
    A[2, 0] = 1.0
    factor = Lsmr().factorise(as_given(A), {})
    np.testing.assert_allclose(factor.solve(np.array([2.0, 0.0, 7.0])), [1.0, 0.0, 2.0], atol=1e-13)
    np.testing.assert_allclose(
        factor.solve_transposed(np.array([4.0, 0.0, 6.0])), [1.0, 0.0, 2.0], atol=1e-13
    )


def test_in_the_derivative_of_a_sparse_system() -> None:
    """y³ + y + 0.3 (its neighbours) = b: first and second derivatives as with dense factors."""

    def conditions(y: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return y**3 + y + 0.3 * (y.roll(1, -1) + y.roll(-1, -1)) - b

    b = torch.linspace(-1, 1, 24, dtype=torch.float64).repeat(2, 1).requires_grad_()
    pattern = inv.jacobians.detect_sparsity(conditions, torch.ones(2, 24, dtype=torch.float64), (b,))
    results = []
    for method in (inv.linear.SparseLU(pattern, "scipy.lsmr"), inv.linear.LU()):
        y = inv.root(
            conditions, torch.zeros_like(b), (b,), solver="torch.newton", polish=2,
            adjoint=inv.adjoints.Implicit(linear_solver=method),
        )  # fmt: skip
        (first,) = torch.autograd.grad(y.sin().sum(), b, create_graph=True)
        results.append((first, torch.autograd.grad(first.square().sum(), b)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_too_few_steps_are_measured() -> None:
    adjoint = inv.adjoints.Implicit(
        linear_solver=inv.linear.SparseLU(
            torch.ones(9, 9, dtype=torch.bool), "scipy.lsmr", options={"maxiter": 1}
        )
    )
    A = torch.diag(torch.arange(1.0, 10.0, dtype=torch.float64)) + 0.5
    b = torch.linspace(1, 2, 9, dtype=torch.float64).requires_grad_()
    y = inv.root(lambda y, b: y @ A - b, torch.zeros_like(b), (b,), solver="torch.newton", adjoint=adjoint)
    with pytest.raises(inv.SingularJacobianError, match=r"SparseLU with scipy.lsmr found the Jacobian"):
        (y * torch.arange(9)).sum().backward()


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match=r"scipy.lsmr: unknown option damp; accepted are atol, btol, maxiter"):
        Lsmr().factorise(as_given(np.eye(2)), {"damp": 1.0})
