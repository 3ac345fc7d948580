"""Every installed solver, at its tolerance 1e-6: the gradients are those of the exact KKT system."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import qpsolvers
import torch
from torch import Tensor

import invlayer_core as inv

SIX = ("P", "q", "G", "h", "A", "b")

TOLERANCES = {
    "clarabel": {"tol_gap_abs": 1e-6, "tol_gap_rel": 1e-6, "tol_feas": 1e-6},
    "daqp": {"primal_tol": 1e-6, "dual_tol": 1e-6},
    "ecos": {"feastol": 1e-6, "abstol": 1e-6, "reltol": 1e-6},
    "highs": {"dual_feasibility_tolerance": 1e-6, "primal_feasibility_tolerance": 1e-6},
    "osqp": {"eps_abs": 1e-6, "eps_rel": 1e-6, "max_iter": 100_000},
    "piqp": {"eps_abs": 1e-6, "eps_rel": 1e-6},
    "proxqp": {"eps_abs": 1e-6, "eps_rel": 0.0},
    "quadprog": {},
    "scs": {"eps_abs": 1e-6, "eps_rel": 1e-6},
}
INSTALLED = [name for name in TOLERANCES if name in qpsolvers.available_solvers]


def dense(n: int, seed: int) -> dict[str, Tensor]:
    """n variables, n inequalities and n / 5 equations."""
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    root, inside = draw(n, n) / n**0.5, draw(n)
    G, A = draw(n, n), draw(n // 5, n)
    slack = torch.rand(n, generator=draws, dtype=torch.float64)
    return {
        "P": root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64),
        "q": 3 * draw(n),
        "G": G,
        "h": G @ inside + slack,
        "A": A,
        "b": A @ inside,
    }


def exact(given: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x and the gradients of ``weights @ x``, by a dense solve on the active set of an exact solver."""
    arrays = [given[name].numpy() for name in SIX]
    found = qpsolvers.solve_problem(qpsolvers.Problem(*arrays), solver="quadprog")
    active = torch.from_numpy(found.z) > 1e-9
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    C = torch.cat([inputs["A"], inputs["G"][active]])
    d = torch.cat([inputs["b"], inputs["h"][active]])
    P = (inputs["P"] + inputs["P"].mT) / 2
    corner = torch.zeros(len(C), len(C), dtype=torch.float64)
    K = torch.cat([torch.cat([P, C.mT], 1), torch.cat([C, corner], 1)])
    x = torch.linalg.solve(K, torch.cat([-inputs["q"], d]))[: len(weights)]
    return x.detach(), list(torch.autograd.grad(x @ weights, list(inputs.values())))


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("solver", INSTALLED)
def test_six_gradients(solver: str, n: int) -> None:
    """20 seeds, every fourth by the general way, too; an ambiguous active set would warn."""
    for seed in range(20):
        given = dense(n, seed)
        weights = torch.cos(torch.arange(n, dtype=torch.float64))
        x_exact, wanted = exact(given, weights)
        inputs = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        call = functools.partial(inv.qp, **inputs, solver=f"qpsolvers.{solver}", options=TOLERANCES[solver])
        for x in [call()] if seed % 4 else [call(), call(return_info=True)[0]]:
            assert gap(x, x_exact) <= 1e-9
            grads = torch.autograd.grad(x @ weights, list(inputs.values()))
            assert max(map(gap, grads, wanted)) <= 1e-6


@pytest.mark.parametrize("solver", INSTALLED)
def test_multipliers_are_those_of_the_library(solver: str) -> None:
    """Signs and order: against ``qpsolvers`` itself, with bounds on both sides."""
    given = dense(5, 1)
    given["lb"], given["ub"] = torch.full((5,), -0.3).double(), torch.full((5,), 0.4).double()
    given["h"], given["b"] = given["h"].abs() + 2.0, given["b"] * 0
    program = qpsolvers.Problem(*(tensor.numpy() for tensor in given.values()))
    found = qpsolvers.solve_problem(program, solver="quadprog")
    x, multipliers = inv.qp(
        **given, solver=f"qpsolvers.{solver}", options=TOLERANCES[solver], return_multipliers=True
    )
    assert np.abs(x.numpy() - found.x).max() <= 1e-9
    assert np.abs(multipliers.equalities.numpy() - found.y).max() <= 1e-8
    assert np.abs(multipliers.inequalities.numpy() - found.z).max() <= 1e-8
    assert np.abs((multipliers.upper - multipliers.lower).numpy() - found.z_box).max() <= 1e-8
    assert (multipliers.lower > 0).any() or (multipliers.upper > 0).any()


@pytest.mark.parametrize("solver", INSTALLED)
@pytest.mark.parametrize("names", ["P q", "P q lb", "P q A b", "P q G h"])
def test_subsets_of_the_arguments(solver: str, names: str) -> None:
    given = dense(5, 2)
    given["lb"] = torch.full((5,), -0.3).double()
    kept = {name: tensor for name, tensor in given.items() if name in names.split()}
    x = inv.qp(**kept, solver=f"qpsolvers.{solver}", options=TOLERANCES[solver])
    other = inv.qp(**kept, solver="torch.qp")
    assert gap(x, other) <= 1e-9


@pytest.mark.parametrize("solver", INSTALLED)
def test_batch_with_samples_that_have_no_solution(solver: str) -> None:
    given = dense(5, 3)
    q = torch.stack([given["q"], given["q"] * float("nan"), given["q"] + 1]).requires_grad_()
    h = torch.stack([given["h"], given["h"], given["h"]])
    G = torch.cat([given["G"], -given["G"][:1]])
    h = torch.cat([h, torch.tensor([[9.0], [9.0], [-99.0]]).double()], 1)  # the last is infeasible
    x, info = inv.qp(
        given["P"], q, G, h, solver=f"qpsolvers.{solver}", on_failure="nan", return_info=True,
        options=TOLERANCES[solver],
    )  # fmt: skip
    assert info.ok.tolist() == [True, False, False]
    assert info.message[1] == "q holds NaN or infinity; the solver was not called"
    assert info.message[2] != "" or info.status[2] is inv.Status.FALSE_CONVERGENCE
    (bar,) = torch.autograd.grad(x.sum(), q)
    assert bar[0].isfinite().all()
    assert bar[1:].isnan().all()


@pytest.mark.parametrize("solver", INSTALLED)
def test_sparse_matrices(solver: str) -> None:
    given = dense(10, 4)
    thin = {name: (t.to_sparse() if name in "PGA" else t) for name, t in given.items()}
    x = inv.qp(**thin, solver=f"qpsolvers.{solver}", options=TOLERANCES[solver])
    assert gap(x, inv.qp(**given, solver="torch.qp")) <= 1e-9


def test_guess_is_handed_on_and_options_reach_the_solver() -> None:
    given = dense(5, 5)
    x = inv.qp(**given, solver="qpsolvers.osqp")
    again = inv.qp(**given, solver="qpsolvers.osqp", x0=x)
    assert gap(again, x) <= 1e-12
    with pytest.raises(inv.ConvergenceError):
        inv.qp(**given, solver="qpsolvers.osqp", options={"max_iter": 1}, polish=0)


def test_instances_can_be_pickled() -> None:
    solver = inv.get_solver("qpsolvers.clarabel")
    assert type(pickle.loads(pickle.dumps(solver))) is type(solver)


def test_threads_give_the_same() -> None:
    given = dense(5, 6)
    given["q"] = given["q"] + torch.randn(16, 5, dtype=torch.float64)
    serial = inv.qp(**given, solver="qpsolvers.clarabel", batch="serial")
    assert torch.equal(serial, inv.qp(**given, solver="qpsolvers.clarabel", batch="threads"))
