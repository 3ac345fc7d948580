"""Batched Krylov methods: B independent systems A_b x_b = b_b, known only by their products.

Every vector is a row of ``(B, n)``, every scalar of a method is ``(B,)``, and one product serves all
systems. Samples that are done go on with zero steps instead of dividing by zero. The host is asked
only once per ``check_every`` products (GMRES: once per cycle).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch

__all__ = ["KrylovSolution", "bicgstab", "conjugate_gradients", "gmres"]

Product = Callable[[Tensor], Tensor]


@final
class KrylovSolution(NamedTuple):
    """x, how well it solves, and what it cost."""

    x: Tensor  # (B, n)
    residual: Tensor  # (B,) ‖b − A x‖ / ‖b‖, measured at the end; 0 where b is 0
    products: int


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 0 where the bottom is 0: a sample that is done, or a breakdown, stands still."""
    safe = torch.where(bottom == 0, torch.ones_like(bottom), bottom)
    return torch.where(bottom == 0, torch.zeros_like(top), top / safe)


def _relative(residual: Tensor, rhs: Tensor) -> Tensor:
    return _ratio(residual.norm(dim=-1), rhs.norm(dim=-1))


def _all_below(residual: Tensor, rhs: Tensor, rtol: float) -> bool:
    return bool(_functorch.plain(_relative(residual, rhs) <= rtol).all())


def _measured(product: Product, x: Tensor, rhs: Tensor, products: int) -> KrylovSolution:
    return KrylovSolution(x, _relative(rhs - product(x), rhs), products + 1)


@torch.no_grad()
def conjugate_gradients(
    product: Product, rhs: Tensor, *, rtol: float, maxiter: int, check_every: int
) -> KrylovSolution:
    """CG, for symmetric positive definite systems (Hestenes & Stiefel 1952)."""
    x, r = torch.zeros_like(rhs), rhs
    p, rr = r, _dot(r, r)
    for k in range(1, maxiter + 1):
        q = product(p)
        alpha = _ratio(rr, _dot(p, q))
        x, r = x + alpha * p, r - alpha * q
        new = _dot(r, r)
        p, rr = r + _ratio(new, rr) * p, new
        if (k % check_every == 0 or k == maxiter) and _all_below(r, rhs, rtol):
            break
    return _measured(product, x, rhs, k)


@torch.no_grad()
def bicgstab(product: Product, rhs: Tensor, *, rtol: float, maxiter: int, check_every: int) -> KrylovSolution:
    """BiCGStab, for any nonsingular systems, with constant memory (van der Vorst 1992)."""
    x, r = torch.zeros_like(rhs), rhs
    shadow, p, rho = rhs, rhs, _dot(rhs, rhs)
    for k in range(1, maxiter + 1):
        v = product(p)
        alpha = _ratio(rho, _dot(shadow, v))
        s = r - alpha * v
        t = product(s)
        omega = _ratio(_dot(t, s), _dot(t, t))
        x, r = x + alpha * p + omega * s, s - omega * t
        new = _dot(shadow, r)
        p = r + _ratio(new, rho) * _ratio(alpha, omega) * (p - omega * v)
        rho = new
        if (k % check_every == 0 or k == maxiter) and _all_below(r, rhs, rtol):
            break
    return _measured(product, x, rhs, 2 * k)


@torch.no_grad()
def gmres(product: Product, rhs: Tensor, *, rtol: float, maxiter: int, restart: int) -> KrylovSolution:
    """Restarted GMRES, for any nonsingular systems (Saad & Schultz 1986)."""
    x, r, products = torch.zeros_like(rhs), rhs, 0
    size = min(restart, rhs.shape[-1])
    while products < maxiter:
        steps = min(size, maxiter - products)
        x = x + _cycle(product, r, steps)
        r = rhs - product(x)
        products += steps + 1
        if _all_below(r, rhs, rtol):
            break
    return KrylovSolution(x, _relative(r, rhs), products)


def _cycle(product: Product, residual: Tensor, steps: int) -> Tensor:
    """The correction of least residual in the space of ``steps`` products, orthogonalised twice."""
    beta = residual.norm(dim=-1, keepdim=True)
    basis = [_ratio(residual, beta.expand_as(residual))]
    columns = []
    for _ in range(steps):
        space = torch.stack(basis, dim=-2)  # (B, k, n)
        w = product(basis[-1])
        h = torch.zeros_like(space[..., 0])
        for _ in range(2):  # once is not enough in floating point (Giraud et al. 2005)
            projection = (space @ w.unsqueeze(-1)).squeeze(-1)
            w = w - (projection.unsqueeze(-2) @ space).squeeze(-2)
            h = h + projection
        length = w.norm(dim=-1, keepdim=True)
        scale = h.norm(dim=-1, keepdim=True)
        length = torch.where(
            length <= 10 * torch.finfo(w.dtype).eps * scale, torch.zeros_like(length), length
        )
        basis.append(_ratio(w, length.expand_as(w)))
        columns.append(torch.cat([h, length], dim=-1))
    return _combine(basis[:-1], columns, beta)


def _combine(basis: list[Tensor], columns: list[Tensor], beta: Tensor) -> Tensor:
    """min ‖β e₁ − H z‖ for the Hessenberg matrix H, then the combination of the basis by z."""
    steps = len(columns)
    padded = [torch.nn.functional.pad(column, (0, steps + 1 - column.shape[-1])) for column in columns]
    hessenberg = torch.stack(padded, dim=-1)  # (B, steps + 1, steps)
    target = torch.nn.functional.pad(beta, (0, steps))
    # An early end of the space leaves zero columns: least norm keeps their weights zero.
    weights = (torch.linalg.pinv(hessenberg) @ target.unsqueeze(-1)).squeeze(-1)
    return (weights.unsqueeze(-2) @ torch.stack(basis, dim=-2)).squeeze(-2)
