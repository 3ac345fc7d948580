"""``torch.qp``: values against exact ones, samples that go their own ways, scaling, options, certificates."""

from __future__ import annotations

import pytest
import torch
from tests.quadratic.programs import TryAll, program

import invlayer_core as inv


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_trying_every_active_set(seed: int) -> None:
    torch.manual_seed(seed)
    given = program(batched="P q G h A b lb ub", batch=4)
    ours = inv.qp(**given, solver="torch.qp", polish=0)
    assert (ours - inv.qp(**given, solver=TryAll())).abs().max() <= 1e-6
    assert (inv.qp(**given, solver="torch.qp") - inv.qp(**given, solver=TryAll())).abs().max() <= 1e-11


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    given = program(batched="P q G h A b lb ub", batch=5)
    whole = inv.qp(**given, solver="torch.qp", polish=0)
    changed = {name: tensor.clone() for name, tensor in given.items()}
    changed["h"][3] = -100.0  # infeasible
    changed["q"][1] *= 1e4
    other = inv.qp(**changed, solver="torch.qp", polish=0, on_failure="nan")
    assert torch.equal(whole[[0, 2, 4]], other[[0, 2, 4]])
    assert other[3].isnan().all()


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scaling_of_the_objective_and_the_rows(scale: float) -> None:
    given = program("P q G h A b")
    x = inv.qp(**given, solver="torch.qp")
    objective = {**given, "P": given["P"] * scale, "q": given["q"] * scale}
    rows = {**given, **{name: given[name] * scale for name in ("G", "h", "A", "b")}}
    for scaled in (objective, rows):
        assert (inv.qp(**scaled, solver="torch.qp") - x).abs().max() <= 1e-9


def test_iterations_are_told_and_limited() -> None:
    given = program(batched="q")
    _, info = inv.qp(**given, solver="torch.qp", return_info=True)
    assert (info.iterations > 0).all()
    assert (info.iterations <= 30).all()
    with pytest.raises(inv.ConvergenceError, match="out of iterations"):
        inv.qp(**given, solver="torch.qp", options={"max_iterations": 2}, polish=0)


def test_dependent_rows_and_a_singular_p() -> None:
    A = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    P = torch.diag(torch.tensor([1.0, 0.0, 0.0])).double()
    q = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    x = inv.qp(
        P, q, A=A, b=A @ torch.tensor([1.0, 2.0, 0.0]).double(), lb=torch.zeros(3).double(), solver="torch.qp"
    )
    assert (x - torch.tensor([0.0, 3.0, 0.0])).abs().max() <= 1e-9
