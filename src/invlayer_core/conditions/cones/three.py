"""Three-dimensional cones with a curved boundary: the exponential cone and the power cones.

K = {s : h(s) ≤ 0} with h convex. Where the projection s of w is on the smooth part of the boundary,

    s − w + μ ∇h(s) = 0,   h(s) = 0,   μ > 0,

and differentiating it gives, with g = ∇h(s) and M = I + μ ∇²h(s),

    ds/dw = M⁻¹ − M⁻¹ g gᵀ M⁻¹ / (gᵀ M⁻¹ g).

Both cones are curved in one direction only, ∇²h = κ e eᵀ, with e in the plane of the first two coordinates.
In the orthonormal basis (e, f, z-axis) M = diag(1 + μ κ, 1, 1), and the matrix above can be written without
differences, so that it is right to all digits where the boundary is almost flat or almost a corner. By
Moreau's decomposition Π_K*(v) = v + Π_K(−v).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.custom import project_iteratively
from invlayer_core.conditions.cones.family import ConeFamily

__all__ = ["Boundary", "Regions", "ThreeDimensionalFamily"]


@final
class Regions(NamedTuple):
    """Which points are inside K, inside the polar cone, on a flat face; bool, ``(...,)`` each."""

    inside: Tensor
    polar: Tensor
    face: Tensor


@final
class Boundary(NamedTuple):
    """h at s, in any scale, in the basis e = (e₁, e₂, 0), f = (−e₂, e₁, 0), z-axis; ``(...,)`` each."""

    direction: tuple[Tensor, Tensor]  # e₁ and e₂
    gradient: tuple[Tensor, Tensor, Tensor]
    curvature: Tensor  # κ


class ThreeDimensionalFamily(ConeFamily):
    """Cones of one kind in three dimensions.

    Attributes
    ----------
    name : str
        For messages.
    """

    size = 3
    name: str

    @abstractmethod
    def regions(self, w: Tensor) -> Regions:
        """Where each w is."""

    @abstractmethod
    def on_boundary(self, w: Tensor) -> Tensor:
        """Π_K(w) for w whose projection is on the smooth boundary; no derivative."""

    @abstractmethod
    def on_face(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Π_K(w) on a flat face, and the diagonal of its derivative."""

    @abstractmethod
    def boundary(self, s: Tensor) -> Boundary:
        """The boundary at s = Π_K(w), differentiable."""

    @abstractmethod
    def example(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A point whose projection is on the smooth boundary, and that projection; for each cone, or all."""

    def project_dual(self, v: Tensor) -> Tensor:
        return v + project_iteratively(self, -v)

    def derivative(self, v: Tensor) -> Tensor:
        identity = torch.eye(3, dtype=v.dtype, device=v.device)
        return identity - self.matrix(-v, project_iteratively(self, -v))

    @torch.no_grad()
    def find_projection(self, w: Tensor) -> Tensor:
        """Π_K(w) ``(..., 3)`` in every region."""
        inside, polar, face = (region.unsqueeze(-1) for region in self.regions(w))
        smooth = ~(inside | polar | face) & w.isfinite().all(-1, keepdim=True)
        s = self.on_boundary(torch.where(smooth, w, self.example(w)[0]))
        s = torch.where(smooth, s, torch.where(face, self.on_face(w)[0], torch.zeros_like(w)))
        s = torch.where(inside, w, s)
        return torch.where(w.isfinite().all(-1, keepdim=True), s, torch.nan)

    def matrix(self, w: Tensor, s: Tensor) -> Tensor:
        """dΠ_K at w, ``(..., 3, 3)``, as a differentiable expression in w and s = Π_K(w)."""
        inside, polar, face = (region[..., None, None] for region in self.regions(w.detach()))
        decided = (inside | polar | face)[..., 0]
        flat = torch.diag_embed(self.on_face(w.detach())[1])
        point, projection = self.example(w)
        w, s = torch.where(decided, point, w), torch.where(decided, projection, s)
        smooth = _derivative(w - s, self.boundary(s))
        identity = torch.eye(3, dtype=w.dtype, device=w.device)
        elsewhere = torch.where(inside, identity, torch.where(face, flat, torch.zeros_like(flat)))
        return torch.where(inside | polar | face, elsewhere, smooth)


def _derivative(outward: Tensor, boundary: Boundary) -> Tensor:
    """The matrix ``(..., 3, 3)`` of the module's docstring; ``outward`` is w − s = μ ∇h."""
    (e1, e2), (a, b, c), kappa = boundary
    x, y, z = outward.unbind(-1)
    length = (a * a + b * b + c * c).sqrt()
    along = ((e1 * x + e2 * y) * a + (e1 * y - e2 * x) * b + z * c) / length  # μ |∇h|
    a, b, c = a / length, b / length, c / length
    k = 1.0 / (1.0 + along / length * kappa)
    q = k * a * a + b * b + c * c
    ee, ef, ez = k * (b * b + c * c) / q, -k * a * b / q, -k * a * c / q
    ff, fz, zz = (k * a * a + c * c) / q, -b * c / q, (k * a * a + b * b) / q
    turned = _symmetric(ee, ef, ez, ff, fz, zz)
    zero = torch.zeros_like(e1)
    basis = torch.stack([e1, -e2, zero, e2, e1, zero, zero, zero, torch.ones_like(e1)], -1)
    basis = basis.reshape(*e1.shape, 3, 3)  # columns e, f, z-axis
    return basis @ turned @ basis.mT


def _symmetric(xx: Tensor, xy: Tensor, xz: Tensor, yy: Tensor, yz: Tensor, zz: Tensor) -> Tensor:
    return torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).reshape(*xx.shape, 3, 3)
