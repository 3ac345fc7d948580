"""Small quadratic programs for the conformance kit, with exact solutions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact_solution", "infeasible_program", "program", "programs"]


def program(seed: int) -> dict[str, Tensor]:
    """Four variables, three rows, one equation, and bounds on both sides; feasible and strictly convex."""
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    root, inside = draw(4, 4), draw(4)
    G, A = draw(3, 4), draw(1, 4)
    return {
        "P": root @ root.mT + torch.eye(4, dtype=torch.float64),
        "q": 3 * draw(4),
        "G": G,
        "h": G @ inside + 0.3 * draw(3).abs(),
        "A": A,
        "b": A @ inside,
        "lb": inside - 0.2 - draw(4).abs(),
        "ub": inside + 0.2 + draw(4).abs(),
    }


def programs() -> dict[str, dict[str, Tensor]]:
    """Programs with all arguments, and with some."""
    whole = program(3)
    subsets = ("P q", "P q G h", "P q A b", "P q lb", "P q ub", "P q G h A b lb ub")
    return {names: {name: whole[name] for name in names.split()} for names in subsets}


def infeasible_program() -> dict[str, Tensor]:
    """x₁ ≤ −1 and x₁ ≥ 1 at once."""
    one = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    return {
        "P": torch.eye(2, dtype=torch.float64),
        "q": one[0],
        "G": one,
        "h": -torch.ones(2, dtype=torch.float64),
    }


def exact_solution(given: dict[str, Tensor], x: Tensor) -> Tensor:
    """The solution on the constraints that are active at ``x``, as a function of the arguments."""
    n = len(given["q"])
    eye = torch.eye(n, dtype=torch.float64)
    rows, limits = [], []
    for matrix, limit, equal in (
        (given.get("A"), given.get("b"), True),
        (given.get("G"), given.get("h"), False),
        (-eye if "lb" in given else None, -given["lb"] if "lb" in given else None, False),
        (eye if "ub" in given else None, given.get("ub"), False),
    ):
        if matrix is None or limit is None:
            continue
        active = (limit - matrix @ x).detach().abs() <= 1e-6
        rows.append(matrix if equal else matrix[active])
        limits.append(limit if equal else limit[active])
    C = torch.cat(rows) if rows else eye[:0]
    corner = torch.zeros(len(C), len(C), dtype=torch.float64)
    K = torch.cat([torch.cat([given["P"], C.mT], 1), torch.cat([C, corner], 1)])
    rhs = torch.cat([-given["q"], *limits])
    return torch.linalg.solve(K, rhs.unsqueeze(-1)).squeeze(-1)[:n]
