"""How z = K⁻¹ r changes with the matrices in K, and the same solve in operations that torch records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import MATRICES, QuadraticLayout
from invlayer_core.linear.lu import solve_recorded

__all__ = ["matrix_bar", "moved", "recorded_saddle_point", "sparing"]


def sparing(z: Tensor, dead: Tensor | None) -> Tensor:
    """z without the values of failed samples, which may be NaN."""
    return z if dead is None else torch.where(dead.unsqueeze(-1), torch.zeros_like(z), z)


def matrix_bar(layout: QuadraticLayout, name: str, held: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """The cotangent of P, G or A: −w zᵀ, where and as often as the matrix stands in K."""
    form, n = layout.forms[name], layout.size
    if name == "P":
        left = torch.stack([w[..., :n], z[..., :n]], -1)
        return form.outer(-0.5 * left, left.flip(-1), held)
    first = n if name == "A" else n + layout.equalities
    rows = slice(first, first + form.rows)
    left = torch.stack([w[..., rows], z[..., rows]], -1)
    right = torch.stack([z[..., :n], w[..., :n]], -1)
    return form.outer(-left, right, held)


def moved(layout: QuadraticLayout, dots: Sequence[Tensor | None], z: Tensor) -> Tensor | None:
    """K̇ z for tangents of P, G and A; None if there are none."""
    given = {name: dot for name, dot in zip(MATRICES, dots, strict=True) if dot is not None}
    if not given:
        return None
    x, (a, g, *bounds) = z[..., : layout.size], z[..., layout.size :].split(layout.sections[1:], -1)
    moved = torch.zeros_like(x)
    if (dot := given.get("P")) is not None:
        form = layout.forms["P"]
        moved = moved + 0.5 * (form.multiply(dot, x) + form.multiply_transposed(dot, x))
    parts = []
    for name, multipliers in (("A", a), ("G", g)):
        if (dot := given.get(name)) is None:
            parts.append(torch.zeros_like(multipliers))
            continue
        moved = moved + layout.forms[name].multiply_transposed(dot, multipliers)
        parts.append(layout.forms[name].multiply(dot, x))
    return torch.cat([moved, *parts, *map(torch.zeros_like, bounds)], -1)


def recorded_saddle_point(
    layout: QuadraticLayout,
    like: Tensor,
    active: Tensor,
    dead: Tensor | None,
    matrices: Sequence[Tensor | None],
    rhs: Tensor,
    dead_value: float,
) -> Tensor:
    """K⁻¹ rhs in operations that torch differentiates itself, for nested forward mode: see ``Implicit``."""
    n, batch = layout.size, active.shape[:-1]
    P, G, A = (
        None if held is None else layout.forms[name].dense(held).expand(*batch, -1, -1)
        for name, held in zip(MATRICES, matrices, strict=True)
    )
    eye = torch.eye(n, dtype=like.dtype, device=like.device).expand(*batch, -1, -1)
    bounds = [sign * eye for name, sign in (("lb", -1.0), ("ub", 1.0)) if name in layout.names]
    K = 0.0 * eye if P is None else 0.5 * (P + P.mT)
    rows = [m for m in (A, G, *bounds) if m is not None]
    if rows:
        mask = active.to(like.dtype)
        C = torch.cat(rows, -2) * mask.unsqueeze(-1)
        K = torch.cat([torch.cat([K, C.mT], -1), torch.cat([C, torch.diag_embed(1.0 - mask)], -1)], -2)
        rhs = torch.cat([rhs[..., :n], rhs[..., n:] * mask], -1)
    if dead is None:
        return solve_recorded(K, rhs)
    whole = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    w = solve_recorded(torch.where(dead[..., None, None], whole, K), sparing(rhs, dead))
    answer = torch.where((rhs != 0).any(-1, keepdim=True), dead_value, 0.0).to(w.dtype)
    return torch.where(dead.unsqueeze(-1), answer, w)
