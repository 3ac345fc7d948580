"""Random programs, a solver that tries every active set, and derivatives of the KKT system as an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv

NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")


def program(
    names: str = "P q G h A b lb ub", *, batched: str = "", batch: int = 3, n: int = 3
) -> dict[str, Tensor]:
    """A feasible, strictly convex program; its arguments in ``batched`` have a batch dim."""

    def draw(name: str, *shape: int) -> Tensor:
        lead = (batch,) if name in batched.split() else ()
        return torch.randn(*lead, *shape, dtype=torch.float64)

    root, inside = draw("P", n, n), torch.randn(n, dtype=torch.float64)
    made = {
        "P": root @ root.mT + torch.eye(n, dtype=torch.float64),
        "q": 3 * draw("q", n),
        "G": draw("G", 2, n),
        "A": draw("A", 1, n),
    }
    made["h"] = made["G"] @ inside + draw("h", 2).abs() * 0.5
    made["b"] = made["A"] @ inside + 0 * draw("b", 1)
    made["lb"], made["ub"] = inside - 0.2 - draw("lb", n).abs(), inside + 0.2 + draw("ub", n).abs()
    return {name: made[name] for name in NAMES if name in names.split()}


def leaves(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in given.items()}


def rows_of(given: Mapping[str, Any], n: int) -> tuple[Any, Any, int]:
    """C, d and the number of equalities of one program, in torch."""
    eye = torch.eye(n, dtype=torch.float64)
    rows, limits = [torch.zeros(0, n, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    for matrix, limit in (("A", "b"), ("G", "h")):
        if matrix in given:
            rows.append(given[matrix])
            limits.append(given[limit])
    if "lb" in given:
        rows.append(-eye)
        limits.append(-given["lb"])
    if "ub" in given:
        rows.append(eye)
        limits.append(given["ub"])
    return torch.cat(rows), torch.cat(limits), given["A"].shape[0] if "A" in given else 0


def kkt_solution(given: Mapping[str, Tensor], active: Tensor) -> Tensor:
    """z = (x, multipliers) on that active set, by one dense solve that torch records."""
    n = given["q"].shape[-1]
    C, d, _ = rows_of(given, n)
    C, d = C[active], d[active]
    P = given["P"] if "P" in given else torch.zeros(n, n, dtype=torch.float64)
    K = torch.cat(
        [torch.cat([(P + P.mT) / 2, C.mT], 1), torch.cat([C, torch.zeros(len(C), len(C)).to(C)], 1)]
    )
    z = torch.linalg.solve(K, torch.cat([-given["q"], d]).unsqueeze(-1)).squeeze(-1)
    whole = torch.zeros(n + active.shape[0], dtype=torch.float64)
    places = torch.cat([torch.ones(n, dtype=torch.bool), active]).nonzero().reshape(-1)
    return whole.index_copy(0, places, z)


class TryAll(inv.Solver):
    """Solves a small program by trying every active set, in NumPy; ``noise`` spoils its answer.

    With ``hide`` it tells no multipliers.
    """

    def __init__(self, noise: float = 0.0, *, hide: bool = False) -> None:
        self.noise, self.hide = noise, hide

    def solve(
        self, problem: inv.QuadraticProblem, y0: np.ndarray, options: Mapping[str, Any]
    ) -> inv.SolverResult:
        given = {
            name: torch.from_numpy(value) for name in NAMES if (value := getattr(problem, name)) is not None
        }
        n = problem.size
        C, d, equalities = rows_of(given, n)
        z = _first_optimal(given, C, d, equalities)
        if z is None:
            return inv.SolverResult(
                y=problem.answer(np.full(n, 7.0)), success=False, message="no active set fits"
            )
        spoiled = np.random.default_rng(problem.index).standard_normal(len(z))
        vector = z.numpy() + self.noise * spoiled
        if self.hide:
            return inv.SolverResult(y=problem.answer(vector[:n]))
        return inv.SolverResult(y=vector)


def _first_optimal(given: Mapping[str, Tensor], C: Tensor, d: Tensor, equalities: int) -> Tensor | None:
    n = given["q"].shape[-1]
    others = [i for i in range(equalities, len(d)) if bool(d[i].isfinite())]
    for chosen in chain.from_iterable(combinations(others, k) for k in range(n - equalities + 1)):
        active = torch.zeros(len(d), dtype=torch.bool)
        active[[*range(equalities), *chosen]] = True
        try:
            z = kkt_solution(given, active)
        except RuntimeError:  # singular
            continue
        if bool((C @ z[:n] <= d + 1e-9).all()) and bool((z[n + equalities :] >= -1e-9).all()):
            return z
    return None
