"""Every registered solver on cone programs posed directly, as the conformance kit does for equations."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import invlayer_core as inv

POLYHEDRAL = ["cvxpy.clarabel", "cvxpy.scs", "cvxpy.osqp", "cvxpy.highs", "cvxpy.ecos", "cvxpy.piqp"]
ALL_CONES = ["cvxpy.clarabel", "cvxpy.scs"]


def program(cones: inv.Cones, n: int = 4, batch: int = 3) -> tuple[inv.ConeStructure, list[torch.Tensor]]:
    """½‖x‖² + qᵀx with b inside the cone, so that x = 0 is strictly feasible."""
    structure = inv.ConeStructure.dense(n, cones)
    rows, cols = structure.P
    inner = [torch.zeros(cones.zero), torch.full((cones.nonneg,), 0.5)]
    inner += [torch.eye(1, size)[0] for size in cones.soc]
    for side in cones.psd:
        low, high = torch.tril_indices(side, side)
        inner.append((low == high).double())
    inner += [torch.tensor([-1.0, 1.0, 1.0])] * cones.exp + [torch.tensor([1.0, 1.0, 0.2])] * len(cones.power)
    A = torch.randn(len(structure.A[0]))
    return structure, [(rows == cols).double(), 2 * torch.randn(batch, n), A, torch.cat(inner)]


CONES = {
    "polyhedral": inv.Cones(zero=1, nonneg=4),
    "soc": inv.Cones(zero=1, nonneg=1, soc=(3, 2)),
    "psd": inv.Cones(nonneg=1, psd=(3, 2)),
    "exp": inv.Cones(nonneg=1, exp=2),
    "power": inv.Cones(nonneg=1, power=(0.3, 0.6)),
}


@pytest.mark.parametrize(
    ("cones", "solver"),
    [("polyhedral", s) for s in POLYHEDRAL]
    + [(c, s) for c in ("soc", "psd", "exp", "power") for s in ALL_CONES]
    + [("soc", "cvxpy.ecos"), ("exp", "cvxpy.ecos"), ("soc", "cvxpy.qoco")],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_solver_solves_every_cone_that_it_knows(cones: str, solver: str) -> None:
    if solver == "cvxpy.qoco" and find_spec("qoco") is None:
        with pytest.raises(inv.SolverLoadError, match="qoco"):
            inv.get_solver(solver)
        return
    structure, tensors = program(CONES[cones])
    found, info = inv.cone_program(*tensors, structure, solver=solver, polish=0, return_info=True, atol=1e-4)
    assert info.ok.all()
    polished = inv.cone_program(*tensors, structure, solver=solver)
    exact = inv.cone_program(*tensors, structure, solver="cvxpy.clarabel")
    for rough, fine, reference in zip(found, polished, exact, strict=True):
        assert (rough - reference).abs().max() < 1e-3
        torch.testing.assert_close(fine, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["cvxpy.osqp", "cvxpy.highs"])
def test_a_cone_that_a_solver_does_not_know(solver: str) -> None:
    structure, tensors = program(CONES["soc"])
    with pytest.raises(inv.ConditionsError, match=rf"{solver} came with .* does not know the cones soc"):
        inv.cone_program(*tensors, structure, solver=solver)


@pytest.mark.parametrize("solver", ["cvxpy.clarabel", "cvxpy.scs", "cvxpy.osqp", "cvxpy.highs"])
def test_an_unknown_option(solver: str) -> None:
    structure, tensors = program(CONES["polyhedral"])
    with pytest.raises(TypeError, match=f"{solver}: .*option nonsense"):
        inv.cone_program(*tensors, structure, solver=solver, options={"nonsense": 1})


def test_listing_imports_no_solver_library() -> None:
    code = (
        "import sys, invlayer_core as inv; names = [s.name for s in inv.solvers('cone')]; "
        "assert {'cvxpy.clarabel', 'cvxpy.scs', 'cvxpy.osqp', 'cvxpy.highs'} <= set(names), names; "
        "assert not {'cvxpy', 'clarabel', 'scs', 'osqp', 'highspy', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
