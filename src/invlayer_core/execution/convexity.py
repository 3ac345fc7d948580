"""Whether P has a negative eigenvalue, so that what satisfies the conditions need be no minimum."""

from __future__ import annotations

from typing import Final

import torch
from torch import Size, Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram
from invlayer_core.matrices import SparseForm

__all__ = ["CONCAVE", "SEMIDEFINITE", "not_convex"]

CONCAVE: Final = (
    "P is not positive semidefinite: the program is not convex, and what satisfies the conditions need be no "
    "minimum"
)


def not_convex(program: QuadraticProgram, batch: Size) -> Tensor | None:
    """Which samples have a P with a negative eigenvalue, ``(B,)``; None if none is seen to have one."""
    if "P" not in program.tensors or not batch.numel():
        return None
    held, form = program.tensors["P"], program.layout.forms["P"]
    negative = (
        _has_negative_direction(program, form) if isinstance(form, SparseForm) else _is_indefinite(held)
    )
    if not bool(negative.any()):
        return None
    return negative.expand(batch).reshape(-1)


def _is_indefinite(P: Tensor) -> Tensor:
    """By a Cholesky factorisation, up to rounding; ``(*batch,)``."""
    P = 0.5 * (P + P.mT)
    size = P.abs().amax((-1, -2)) if P.shape[-1] else P.new_zeros(P.shape[:-2])
    ridge = torch.where(size > 0, SEMIDEFINITE * size, torch.ones_like(size))
    shifted = P + torch.diag_embed(ridge.unsqueeze(-1).expand(*P.shape[:-1]))
    return (torch.linalg.cholesky_ex(shifted).info > 0) & P.isfinite().all(-1).all(-1)


def _has_negative_direction(program: QuadraticProgram, form: SparseForm) -> Tensor:
    """By the diagonal, and a few steps of the power method: what it finds is proof, what it misses is not."""
    held = program.tensors["P"]
    on_diagonal = form.row == form.column
    size = held.abs().amax(-1, keepdim=True) if held.shape[-1] else held.new_zeros(*held.shape[:-1], 1)
    found = ((held < -SEMIDEFINITE * size) & on_diagonal).any(-1)
    if bool(on_diagonal.all()):
        return found
    x = torch.randn(*held.shape[:-1], form.rows, generator=torch.Generator().manual_seed(0), dtype=held.dtype)
    x = x.to(held.device)
    top = form.multiply(held.abs(), torch.ones_like(x)).amax(-1, keepdim=True)
    for _ in range(_POWER_STEPS):
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = top * x - program.curvature(x)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return found | ((x * program.curvature(x)).sum(-1) < -SEMIDEFINITE * top.squeeze(-1))


SEMIDEFINITE: Final = 1e-9  # eigenvalues of P above minus this share of its largest entry pass for zero
_POWER_STEPS: Final = 20
