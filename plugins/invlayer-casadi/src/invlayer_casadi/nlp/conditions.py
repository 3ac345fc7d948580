"""The Karush–Kuhn–Tucker conditions of a nonlinear program with two-sided constraints, as a square system.

With z = (x, λ, ν), the multipliers λ of lbg ≤ g ≤ ubg and ν of lbx ≤ x ≤ ubx, and c = (g, x) with μ = (λ, ν),

    F(z) = [ ∇ₓf + ∂gᵀλ + ν ;  c − Π(c + s μ) ],      Π the projection on [lower, upper].

The second row is the core's two-sided complementarity: CasADi has one multiplier for two bounds, and bounds,
which are tensors, decide sample by sample which rows are equations. s makes μ a length, whatever the units of
f: see :meth:`NlpConditions.scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi.nlp.program import NlpProgram

__all__ = ["ACTIVITIES", "Activity", "ConstraintRows", "CurvatureMemo", "NlpConditions"]

Activity = Literal["exact", "soft"]
ACTIVITIES = get_args(Activity)


@final
class ConstraintRows(NamedTuple):
    """c = (g, x) of every sample with multipliers, s and bounds; ``(*batch, m + n)``, s ``(*batch, 1)``."""

    value: Tensor
    multiplier: Tensor
    scale: Tensor
    lower: Tensor
    upper: Tensor


@final
class CurvatureMemo:
    """The curvature at the last point of one call, for which certificate, polish and derivative all ask."""

    def __init__(self) -> None:
        self._known: tuple[tuple[Tensor, ...], Tensor] | None = None

    def at(self, point: tuple[Tensor, ...], find: Callable[[], Tensor]) -> Tensor:
        """What ``find`` has found, or finds now."""
        if inv.in_transform() or point[0].device.type != "cpu":  # where a look at values costs more
            return find()
        known = self._known  # read once: backward passes may run in several threads
        if known is None or not all(map(torch.equal, known[0], point)):
            self._known = known = tuple(tensor.clone() for tensor in point), find()
        return known[1]


@final
@dataclass(frozen=True)
class NlpConditions:
    """``F(z, p, lbx, ubx, lbg, ubg, unit)``, zero at a minimum with its multipliers.

    z has the multipliers divided by ``unit`` ``(*batch, 1)``, a constant about as large as the objective's
    derivatives, without which ∂F/∂z would be ill-conditioned for an objective in large or small units.
    """

    program: NlpProgram
    activity: Activity = "exact"
    memo: CurvatureMemo = field(default_factory=CurvatureMemo, compare=False)

    def of_one_call(self) -> NlpConditions:
        """The same, with a memory of its own."""
        return replace(self, memo=CurvatureMemo())

    def split(self, z: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z ``(*batch, 2n + m)`` as x, λ and ν."""
        n = self.program.unknowns
        x, lam_g, lam_x = z.split([n, self.program.constraints, n], -1)
        return x, lam_g * unit, lam_x * unit

    def __call__(self, z: Tensor, p: Tensor, *bounds: Tensor) -> Tensor:
        x, lam_g, lam_x = self.split(z, bounds[-1])
        gradient, g = self.program.first(x, p, lam_g)
        rows = self.rows((x, lam_g, lam_x), p, gradient, g, bounds)
        return torch.cat(
            [gradient + lam_x, inv.constraints.two_sided_complementarity(*rows, self.activity)], -1
        )

    def rows(
        self, point: Sequence[Tensor], p: Tensor, gradient: Tensor, g: Tensor, bounds: Sequence[Tensor]
    ) -> ConstraintRows:
        """The constraints at a point (x, λ, ν) where ∇ₓf + ∂gᵀλ and g are known."""
        (x, lam_g, lam_x), (lbx, ubx, lbg, ubg) = point, bounds[:4]
        multiplier = torch.cat([lam_g, lam_x], -1)
        scale = self.scale(multiplier, self.curvature(x, p, lam_g, gradient))
        lower = torch.cat([lbg.expand_as(g), lbx.expand_as(x)], -1)
        upper = torch.cat([ubg.expand_as(g), ubx.expand_as(x)], -1)
        return ConstraintRows(torch.cat([g, x], -1), multiplier, scale, lower, upper)

    @torch.no_grad()
    def scale(self, multiplier: Tensor, curvature: Tensor) -> Tensor:
        """s, ``(*batch, 1)``, as a constant: 1 over the largest multiplier, or the curvature.

        A multiplier over the curvature of the Lagrangian is a length, as a slack is: how far x would move if
        the constraint went.
        """
        largest = torch.maximum(multiplier.detach().abs().amax(-1, keepdim=True), curvature)
        return torch.where((largest > 0) & largest.isfinite(), 1.0 / largest, torch.ones_like(largest))

    @torch.no_grad()
    def curvature(self, x: Tensor, p: Tensor, lam_g: Tensor, gradient: Tensor) -> Tensor:
        """How large ∇²ₓ of the Lagrangian is, about, ``(*batch, 1)``: from one more gradient beside x."""
        point = x.detach(), p.detach(), lam_g.detach()
        return self.memo.at(point, lambda: self._curvature(*point, gradient.detach()))

    def _curvature(self, x: Tensor, p: Tensor, lam_g: Tensor, gradient: Tensor) -> Tensor:
        step = (torch.finfo(x.dtype).eps ** 0.25) * (1.0 + x.abs()) * self.program.uneven.to(x)
        change = self.program.first(x + step, p, lam_g)[0] - gradient
        curvature = change.abs().amax(-1, keepdim=True) / step.abs().amax(-1, keepdim=True)
        return torch.nan_to_num(curvature, 0.0, 0.0, 0.0)

    @torch.no_grad()
    def unit(self, x: Tensor, p: Tensor, lam_g: Tensor) -> Tensor:
        """A power of two about as large as gradient and curvature at the guess, ``(*batch, 1)``."""
        gradient, _ = self.program.first(x, p, lam_g)
        slope = torch.nan_to_num(gradient.abs().amax(-1, keepdim=True), 0.0, 0.0, 0.0)
        largest = torch.maximum(slope, self.curvature(x, p, lam_g, gradient))
        return torch.where(largest > 0, torch.exp2(torch.log2(largest).round()), torch.ones_like(largest))

    @torch.no_grad()
    def weakly_active(self, z: Tensor, p: Tensor, *bounds: Tensor) -> Tensor:
        """Which inequalities among (g, x) hold with equality though their multiplier vanishes."""
        point = self.split(z.detach(), bounds[-1])
        gradient, g = self.program.first(point[0], p, point[1])
        rows = self.rows(point, p, gradient, g, bounds)
        slack = torch.minimum(rows.value - rows.lower, rows.upper - rows.value)
        weak = inv.constraints.weakly_active(slack, rows.multiplier * rows.scale)
        return weak & (rows.lower != rows.upper)
