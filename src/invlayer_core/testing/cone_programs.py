"""Small cone programs for the conformance kit, one for every cone, with solutions in closed form.

Projections onto a cone or a simplex, and the boundary of cones whose projection has no formula: each a
function of one parameter c, with a solution that torch can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.product import Cones
from invlayer_core.conditions.cones.structure import ConeStructure

__all__ = ["ConeCase", "cone_cases", "infeasible_program", "unbounded_program"]

F64 = torch.float64
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class ConeCase:
    """One family of cone programs.

    Attributes
    ----------
    name : str
        The field of :class:`Cones` that it is for.
    structure : ConeStructure
    data : callable
        P, q, A and b from c.
    exact : callable
        x from c, by a formula.
    c : Tensor of shape ``(2, k)``
        Two values of the parameter.
    """

    name: str
    structure: ConeStructure
    data: Callable[[Tensor], Data]
    exact: Callable[[Tensor], Tensor]
    c: Tensor


def cone_cases() -> tuple[ConeCase, ...]:
    """One case for each kind of cone."""
    return _hyperplane(), _simplex(), _second_order(), _semidefinite(), _exponential(), _power()


def _hyperplane() -> ConeCase:
    """The point with aᵀx = 1 that is nearest to c."""
    a = torch.tensor([1.0, -2.0, 2.0], dtype=F64)
    structure = _structure(3, Cones(zero=1), quadratic=True)
    return ConeCase(
        "zero", structure,
        lambda c: (torch.ones(3, dtype=F64), -c, a, torch.ones(1, dtype=F64)),
        lambda c: c + (1.0 - (c * a).sum(-1, keepdim=True)) * a / 9.0,
        torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, -0.3]], dtype=F64),
    )  # fmt: skip


def _simplex() -> ConeCase:
    """The point of the simplex that is nearest to c: (c − τ)₊ with the sum 1."""
    matrix = torch.cat([torch.ones(1, 4, dtype=F64), -torch.eye(4, dtype=F64)])
    b = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=F64)

    def exact(c: Tensor) -> Tensor:
        ordered = c.sort(-1, descending=True).values
        excess = (ordered.cumsum(-1) - 1.0) / torch.arange(1.0, 5.0, dtype=F64)
        last = (ordered > excess).sum(-1, keepdim=True) - 1
        return (c - excess.gather(-1, last)).clamp(min=0.0)

    return ConeCase(
        "nonneg", _structure(4, Cones(zero=1, nonneg=4), quadratic=True),
        lambda c: (torch.ones(4, dtype=F64), -c, matrix.reshape(-1), b), exact,
        torch.tensor([[0.9, 0.5, -0.2, 0.1], [-0.3, 0.2, 0.4, 0.3]], dtype=F64),
    )  # fmt: skip


def _second_order() -> ConeCase:
    """The projection onto two cones of different sizes."""
    return _projection(
        "soc", Cones(soc=(3, 4)),
        lambda c: torch.cat([_on_cone(c[..., :3]), _on_cone(c[..., 3:])], -1),
        torch.tensor([[0.4, 1, -0.7, 0.1, -0.5, 0.8, 0.3], [0.2, -0.3, 0.9, 1, 0.1, -0.2, 0.3]], dtype=F64),
    )  # fmt: skip


def _on_cone(c: Tensor) -> Tensor:
    t, u = c[..., :1], c[..., 1:]
    length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    on_boundary = 0.5 * (t + length) * torch.cat([torch.ones_like(t), u / length], -1)
    return torch.where(length <= t, c, on_boundary)


def _semidefinite() -> ConeCase:
    """The projection onto 4 × 4 matrices, from which layouts of another order than ours can be told."""
    draws = torch.Generator().manual_seed(0)
    cols, rows = torch.tril_indices(4, 4)
    scale = torch.where(rows == cols, 1.0, torch.tensor(2.0, dtype=F64).sqrt())

    def exact(c: Tensor) -> Tensor:
        matrix = torch.zeros(*c.shape[:-1], 4, 4, dtype=F64)
        matrix[..., rows, cols] = matrix[..., cols, rows] = c / scale
        values, vectors = torch.linalg.eigh(matrix)
        found = (vectors * values.clamp(min=0.0).unsqueeze(-2)) @ vectors.mT
        return found[..., rows, cols] * scale

    return _projection("psd", Cones(psd=(4,)), exact, torch.randn(2, 10, generator=draws, dtype=F64))


def _exponential() -> ConeCase:
    """The least z₁ + 2 z₂ with (cᵢ, 1, zᵢ) in the exponential cone: exp(cᵢ)."""
    return _boundary("exp", Cones(zero=4, exp=2), lambda c: c.exp(), [0.0, 0.0], [1.0, 2.0])


def _power() -> ConeCase:
    """The greatest zᵢ with (cᵢ, 1, zᵢ) in the power cones with exponents 0.3 and 0.6."""
    exponents = (0.3, 0.6)
    powers = torch.tensor(exponents, dtype=F64)
    return _boundary("power", Cones(zero=4, power=exponents), lambda c: c**powers, [1.0, 1.0], [-1.0, -2.0])


def _boundary(
    name: str, cones: Cones, last: Callable[[Tensor], Tensor], shift: list[float], cost: list[float]
) -> ConeCase:
    """Two cones of three: their first entries are c, their second 1, and their last as far out as can be."""
    pinned = torch.eye(6, dtype=F64)[[0, 1, 3, 4]]
    matrix = torch.cat([pinned, -torch.eye(6, dtype=F64)]).reshape(-1)
    weights = torch.tensor([0.0, 0.0, cost[0], 0.0, 0.0, cost[1]], dtype=F64)

    def data(c: Tensor) -> Data:
        one, none = torch.ones_like(c[..., :1]), torch.zeros_like(c[..., :1]).expand(*c.shape[:-1], 6)
        return (
            torch.zeros(0, dtype=F64), weights, matrix,
            torch.cat([c[..., :1], one, c[..., 1:], one, none], -1),
        )  # fmt: skip

    def exact(c: Tensor) -> Tensor:
        rows = torch.stack([c, torch.ones_like(c), last(c)], -1)
        return rows.flatten(-2)

    c = torch.tensor([[0.3, -0.4], [0.7, 0.1]], dtype=F64) + torch.tensor(shift, dtype=F64)
    return ConeCase(name, _structure(6, cones, quadratic=False), data, exact, c)


def _projection(name: str, cones: Cones, exact: Callable[[Tensor], Tensor], c: Tensor) -> ConeCase:
    """The point of a cone that is nearest to c."""
    n = cones.size
    minus = -torch.eye(n, dtype=F64).reshape(-1)
    zero, ones = torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64)
    return ConeCase(
        name, _structure(n, cones, quadratic=True), lambda c: (ones, -c, minus, zero), exact, c
    )  # fmt: skip


def _structure(n: int, cones: Cones, *, quadratic: bool) -> ConeStructure:
    """A diagonal P, or none, and an A of any entries, row by row."""
    line, places = torch.arange(n if quadratic else 0), torch.arange(cones.size * n)
    return ConeStructure(n, cones, (line, line), (places // n, places % n))


def infeasible_program() -> tuple[ConeStructure, Data]:
    """x ≥ 1 and x ≤ −1 at once."""
    structure = _structure(1, Cones(nonneg=2), quadratic=True)
    one = torch.ones(1, dtype=F64)
    return structure, (one, one, torch.tensor([-1.0, 1.0], dtype=F64), -torch.ones(2, dtype=F64))


def unbounded_program() -> tuple[ConeStructure, Data]:
    """The least −x with x ≥ 0."""
    nothing, one = torch.zeros(0, dtype=F64), torch.ones(1, dtype=F64)
    return _structure(1, Cones(nonneg=1), quadratic=False), (nothing, -one, -one, torch.zeros(1, dtype=F64))
