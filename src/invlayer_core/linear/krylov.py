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

__all__ = ["KrylovSolution", "bicgstab", "conjugate_gradients", "gmres", "neumann", "right_preconditioned"]

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


def right_preconditioned(
    solve: Callable[[Product], KrylovSolution], product: Product, precondition: Product | None
) -> KrylovSolution:
    """A x = b by way of A M⁻¹ u = b, x = M⁻¹ u; the residual of both is one and the same."""
    if precondition is None:
        return solve(product)
    solution = solve(lambda u: product(precondition(u)))
    return solution._replace(x=precondition(solution.x))


@torch.no_grad()
def conjugate_gradients(
    product: Product,
    rhs: Tensor,
    *,
    rtol: float,
    maxiter: int,
    check_every: int,
    precondition: Product | None = None,
) -> KrylovSolution:
    """CG, for symmetric positive definite systems (Hestenes & Stiefel 1952), and preconditioners that are."""
    x, r = torch.zeros_like(rhs), rhs
    z = r if precondition is None else precondition(r)
    p, rz = z, _dot(r, z)
    for k in range(1, maxiter + 1):
        q = product(p)
        alpha = _ratio(rz, _dot(p, q))
        x, r = x + alpha * p, r - alpha * q
        z = r if precondition is None else precondition(r)
        new = _dot(r, z)
        p, rz = z + _ratio(new, rz) * p, new
        if (k % check_every == 0 or k == maxiter) and _all_below(r, rhs, rtol):
            break
    return _measured(product, x, rhs, k)


@torch.no_grad()
def neumann(product: Product, rhs: Tensor, *, rtol: float, maxiter: int, check_every: int) -> KrylovSolution:
    """x ← x + (A x − b), for A = T′ − I with a contraction T: the Neumann series of (I − T′)⁻¹."""
    x, size = -rhs, rhs.norm(dim=-1)
    goal, beyond = rtol * size, _DIVERGED * size
    for k in range(1, maxiter + 1):
        step = product(x) - rhs  # −r
        if k == maxiter:
            break
        if k % check_every == 0:
            left = step.norm(dim=-1)
            # A sample that diverges, or is NaN, has no say in when to stop.
            if bool(_functorch.plain((left <= goal) | ~(left < beyond)).all()):
                break
        x = x + step
    return KrylovSolution(x, _relative(step, rhs), k)


_DIVERGED = 1e8


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
def gmres(
    product: Product, rhs: Tensor, *, rtol: float, maxiter: int, restart: int, check_every: int
) -> KrylovSolution:
    """Restarted GMRES, for any nonsingular systems (Saad & Schultz 1986)."""
    x, r, products = torch.zeros_like(rhs), rhs, 0
    size, goal = min(restart, rhs.shape[-1]), rhs.norm(dim=-1, keepdim=True) * rtol
    while products < maxiter:
        correction, steps = _cycle(product, r, min(size, maxiter - products), goal, check_every)
        x = x + correction
        r = rhs - product(x)
        products += steps + 1
        if _all_below(r, rhs, rtol):
            break
    return KrylovSolution(x, _relative(r, rhs), products)


def _cycle(
    product: Product, residual: Tensor, most: int, goal: Tensor, check_every: int
) -> tuple[Tensor, int]:
    """The correction of least residual in a space of ``most`` products, or fewer once all are at the goal."""
    beta = residual.norm(dim=-1, keepdim=True)
    basis = _Basis(_ratio(residual, beta.expand_as(residual)), most + 1)
    columns: list[Tensor] = []
    for step in range(1, most + 1):
        w, column = _orthogonalised(product(basis.last), basis.vectors)
        basis.append(w)
        columns.append(column)
        if step == most or step % check_every == 0:
            weights, left = _least_squares(columns, beta)
            if step == most or bool(_functorch.plain(left <= goal).all()):
                break
    return (weights.unsqueeze(-2) @ basis.vectors.narrow(-2, 0, step)).squeeze(-2), step


@final
class _Basis:
    """Orthonormal vectors ``(B, k, n)``, growing in place; by copy where a transform forbids that."""

    def __init__(self, first: Tensor, most: int) -> None:
        self.last, self._count = first, 1
        self._in_place = not (_functorch.is_active() or _functorch.is_mapped_by_autograd(first))
        self._room = first.unsqueeze(-2)
        if self._in_place:
            self._room = first.new_empty(*first.shape[:-1], most, first.shape[-1])
            self._room[..., 0, :] = first

    @property
    def vectors(self) -> Tensor:
        return self._room.narrow(-2, 0, self._count)

    def append(self, vector: Tensor) -> None:
        if self._in_place:
            self._room[..., self._count, :] = vector
        else:
            self._room = torch.cat([self._room, vector.unsqueeze(-2)], dim=-2)
        self.last, self._count = vector, self._count + 1


def _orthogonalised(w: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """w made orthogonal to the space, of length 1 (0 where the space is exhausted), and its column of H."""
    projections = []
    for _ in range(2):  # once is not enough in floating point (Giraud et al. 2005)
        projections.append((space @ w.unsqueeze(-1)).squeeze(-1))
        w = w - (projections[-1].unsqueeze(-2) @ space).squeeze(-2)
    h = projections[0] + projections[1]
    length, scale = w.norm(dim=-1, keepdim=True), h.norm(dim=-1, keepdim=True)
    length = torch.where(length <= 10 * torch.finfo(w.dtype).eps * scale, torch.zeros_like(length), length)
    return _ratio(w, length.expand_as(w)), torch.cat([h, length], dim=-1)


def _least_squares(columns: list[Tensor], beta: Tensor) -> tuple[Tensor, Tensor]:
    """z with min ‖β e₁ − H z‖ for the Hessenberg matrix H of these columns, by QR; and that minimum."""
    steps = len(columns)
    padded = [torch.nn.functional.pad(column, (0, steps + 1 - column.shape[-1])) for column in columns]
    hessenberg = torch.stack(padded, dim=-1)  # (B, steps + 1, steps)
    target = torch.nn.functional.pad(beta, (0, steps))
    q, r = torch.linalg.qr(hessenberg)
    # An exhausted space leaves zero columns: their weights become zero.
    pivots = r.diagonal(dim1=-2, dim2=-1)
    empty = pivots.abs() <= 10 * torch.finfo(r.dtype).eps * pivots.abs().amax(-1, keepdim=True)
    r = torch.where(empty.unsqueeze(-1), torch.zeros_like(r), r) + torch.diag_embed(empty.to(r.dtype))
    turned = torch.where(empty, torch.zeros_like(pivots), (q.mT @ target.unsqueeze(-1)).squeeze(-1))
    z = torch.linalg.solve_triangular(r, turned.unsqueeze(-1), upper=True)
    left = target - (hessenberg @ z).squeeze(-1)
    return z.squeeze(-1), left.norm(dim=-1, keepdim=True)
