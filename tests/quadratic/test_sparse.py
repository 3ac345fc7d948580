"""Sparse matrices: gradients on the pattern, in the given layout, and the same numbers as dense ones."""

from __future__ import annotations

import pytest
import torch
from tests.quadratic.programs import TryAll, leaves, program
from torch import Tensor

import invlayer_core as inv

pytestmark = [
    pytest.mark.plugin("invlayer-scipy"),  # for its sparse LU
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
LAYOUTS = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr}


def thinned(seed: int, batched: str = "q") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    given = program("P q G h A b lb ub", batched=batched)
    given["P"] = (
        torch.diag(given["P"].diagonal()) + 0.5 * torch.diag(torch.ones(2), 1).double()
    )  # not symmetric
    given["G"] = given["G"] * torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    given["h"] = given["G"] @ torch.zeros(3).double() + 0.5
    given["b"] = given["b"] * 0
    given["lb"], given["ub"] = -torch.ones(3).double(), torch.ones(3).double()
    return given


def sparse(given: dict[str, Tensor], layout: str, names: str = "PGA") -> dict[str, Tensor]:
    convert = LAYOUTS[layout]
    return {
        k: (convert(v.detach()) if k in names else v.detach().clone()).requires_grad_()
        for k, v in given.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["PGA", "G", "P"])
@pytest.mark.parametrize("seed", range(3))
def test_same_as_dense(layout: str, names: str, seed: int) -> None:
    given = thinned(seed)
    dense, thin = leaves(given), sparse(given, layout, names)
    weights = torch.randn(3, 3, dtype=torch.float64)
    for inputs in (dense, thin):
        x, multipliers = inv.qp(**inputs, solver=_dense_only(), return_multipliers=True)
        ((x * weights).sum() + multipliers.upper.sum() + multipliers.inequalities.sum()).backward()
    for name, tensor in thin.items():
        assert tensor.grad.layout == tensor.layout
        wanted = dense[name].grad
        if name in names:
            wanted = wanted * (given[name] != 0)
            assert tensor.grad.to_dense().shape == wanted.shape
        found = tensor.grad if tensor.layout is torch.strided else tensor.grad.to_dense()
        assert (found - wanted).abs().max() <= 1e-11 * (1 + wanted.abs().max()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batched_matrices_with_patterns_of_their_own(layout: str) -> None:
    given = thinned(0)
    mask = torch.stack([torch.tensor([[1.0, 0, 1], [0, 1, 1]]), torch.tensor([[0.0, 1, 1], [1, 1, 0]])])
    given["G"], given["q"] = torch.randn(2, 2, 3).double() * mask, given["q"][:2]
    dense, thin = leaves(given), sparse(given, layout, "G")
    for inputs in (dense, thin):
        inv.qp(**inputs, solver="torch.qp").square().sum().backward()
    assert thin["G"].grad.layout == thin["G"].layout
    assert (thin["G"].grad.to_dense() - dense["G"].grad * mask).abs().max() <= 1e-12
    assert (thin["q"].grad - dense["q"].grad).abs().max() <= 1e-12


def _dense_only() -> inv.Solver:
    """``TryAll``, given matrices as it wants them."""

    class Converting(TryAll):
        def solve(self, problem, y0, options):
            changes = {
                name: _array(value)
                for name in ("P", "G", "A")
                if isinstance(value := getattr(problem, name), inv.CoordinateMatrix)
            }
            from dataclasses import replace

            return super().solve(replace(problem, **changes), y0, options)

    return Converting(1e-6)


def _array(given: inv.CoordinateMatrix):
    import numpy as np

    array = np.zeros(given.shape)
    np.add.at(array, (given.rows, given.columns), given.values)
    return array


def test_second_derivatives_and_vmap() -> None:
    given = thinned(0, batched="")
    thin, dense = sparse(given, "coo"), leaves(given)

    def slopes(inputs: dict[str, Tensor]) -> Tensor:
        x = inv.qp(**inputs, solver="torch.qp")
        (bar,) = torch.autograd.grad((x**3).sum(), inputs["q"], create_graph=True)
        return torch.autograd.grad((bar**2).sum(), inputs["h"])[0]

    assert (slopes(thin) - slopes(dense)).abs().max() <= 1e-11
    qs = torch.randn(4, 3, dtype=torch.float64)
    fixed = {k: v.detach() for k, v in thin.items() if k != "q"}
    mapped = torch.vmap(lambda q: inv.qp(q=q, **fixed, solver="torch.qp"))(qs)
    assert torch.allclose(mapped, inv.qp(q=qs, **fixed, solver="torch.qp"), rtol=0, atol=1e-13)


def test_redundant_rows() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64).to_sparse().requires_grad_()
    q = torch.tensor([-3.0, 1.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (x, multipliers), info = inv.qp(
        eye, q, A=A, b=b, solver="torch.qp", return_multipliers=True, return_info=True
    )
    assert not info.constraints.independent
    assert (multipliers.equalities - torch.tensor([0.1, 0.2])).abs().max() <= 1e-8
    x[0].backward()
    assert (q.grad - torch.tensor([-0.5, 0.5])).abs().max() <= 1e-8
    assert (b.grad - torch.tensor([0.1, 0.2])).abs().max() <= 1e-8
    with pytest.raises(inv.SingularJacobianError):
        _ = inv.qp(eye, q, A=A, b=b, solver="torch.qp", return_multipliers=True)[1].equalities[0].backward()


def test_concave_and_nan() -> None:
    P = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).to_sparse()
    q, one = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(inv.ConvergenceError, match="P is not positive semidefinite"):
        inv.qp(P, q, lb=-one, ub=one, solver="torch.qp")
    thin = sparse(thinned(0), "coo")
    thin["q"] = (thin["q"].detach() * float("nan")).requires_grad_()
    x = inv.qp(**thin, solver="torch.qp", on_failure="nan")
    x.sum().backward()
    grads = [t.grad if t.grad.layout is torch.strided else t.grad.coalesce().values() for t in thin.values()]
    assert all(grad.isnan().all() for grad in grads)
