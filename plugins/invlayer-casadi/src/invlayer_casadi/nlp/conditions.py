"""The Karush–Kuhn–Tucker conditions of a nonlinear program with two-sided constraints, as a square system.

With z = (x, λ, ν), the multipliers λ of lbg ≤ g ≤ ubg and ν of lbx ≤ x ≤ ubx, and c one of g, x with its μ,

    F(z) = [ ∇ₓf + ∂gᵀλ + ν ;  c − Π(c + s μ) ],      Π the projection on [lower, upper].

The second row is the *natural residual* (Facchinei & Pang 2003, section 1.5): zero exactly where c is within
its bounds and μ has the sign that goes with the bound that is attained. It is c − upper where c + s μ is
above that, c − lower where it is below that, and −s μ in between (here −μ, which has the units of the first
row): the primal–dual test of the active set (Hintermüller, Ito & Kunisch 2002), for one multiplier of two
bounds. s makes μ a length, whatever the units of f: ``scale_of``.

*Soft* rows are θ (c − bound) − (1 − θ) s μ with θ = s|μ| / (s|μ| + slack), whose derivative is that of
slack · μ = const, the perturbed complementarity that an interior-point method stopped at. θ ∈ {0, 1} is the
exact active set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from invlayer_casadi.nlp.program import NlpProgram

__all__ = ["ACTIVITIES", "Activity", "NlpConditions", "activity_of", "scale_of"]

Activity = Literal["exact", "soft"]
ACTIVITIES = get_args(Activity)


def scale_of(lam_g: Tensor, lam_x: Tensor, curvature: Tensor) -> Tensor:
    """s of every sample, ``(*batch, 1)``, as a constant: 1 over the curvature and the largest multiplier.

    A multiplier over the curvature of the Lagrangian is a length, as a slack is: how far x would move if the
    constraint went.
    """
    largest = torch.cat([lam_g.abs(), lam_x.abs(), curvature], -1).detach().amax(-1, keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), 1.0 / largest, torch.ones_like(largest))


def activity_of(
    value: Tensor, scaled: Tensor, lower: Tensor, upper: Tensor, activity: Activity
) -> tuple[Tensor, Tensor]:
    """The weight θ of every constraint row, and the bound that it is weighed with; both as constants.

    Parameters
    ----------
    value, scaled : Tensor of shape ``(*batch, k)``
        c and s μ.
    lower, upper : Tensor of shape ``(*batch, k)``
    activity : {"exact", "soft"}
    """
    value, scaled, lower, upper = (tensor.detach() for tensor in (value, scaled, lower, upper))
    above, below, fixed = value + scaled > upper, value + scaled < lower, lower == upper
    on_upper = above | (~below & (scaled > 0))
    bound = torch.where(on_upper, upper, lower)
    if activity == "exact":
        weight = (above | below).to(value)
    else:
        slack = torch.where(on_upper, upper - value, value - lower).clamp(min=0.0)
        total = slack + scaled.abs()
        weight = torch.where(total > 0, scaled.abs() / total, torch.zeros_like(total))
        weight = torch.where(bound.isfinite(), weight, torch.zeros_like(weight))
    return torch.where(fixed | value.isnan(), torch.ones_like(weight), weight), on_upper


@final
@dataclass(frozen=True)
class NlpConditions:
    """``F(z, p, lbx, ubx, lbg, ubg, unit)``, zero at a minimum with its multipliers.

    z has the multipliers divided by ``unit`` ``(*batch, 1)``, a constant about as large as the objective's
    derivatives, without which ∂F/∂z would be ill-conditioned for an objective in large or small units.
    """

    program: NlpProgram
    activity: Activity = "exact"

    def split(self, z: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z ``(*batch, 2n + m)`` as x, λ and ν."""
        n = self.program.unknowns
        x, lam_g, lam_x = z.split([n, self.program.constraints, n], -1)
        return x, lam_g * unit, lam_x * unit

    def __call__(self, z: Tensor, p: Tensor, *bounds: Tensor) -> Tensor:
        lbx, ubx, lbg, ubg, unit = bounds
        x, lam_g, lam_x = self.split(z, unit)
        gradient, g = self.program.first(x, p, lam_g)
        scale = self.scale(x, p, lam_g, lam_x, gradient)
        return torch.cat(
            [gradient + lam_x, self._row(g, lam_g, scale, lbg, ubg), self._row(x, lam_x, scale, lbx, ubx)],
            -1,
        )

    @torch.no_grad()
    def scale(self, x: Tensor, p: Tensor, lam_g: Tensor, lam_x: Tensor, gradient: Tensor) -> Tensor:
        """s at this point."""
        return scale_of(lam_g, lam_x, self.curvature(x, p, lam_g, gradient))

    @torch.no_grad()
    def curvature(self, x: Tensor, p: Tensor, lam_g: Tensor, gradient: Tensor) -> Tensor:
        """How large ∇²ₓ of the Lagrangian is, about, ``(*batch, 1)``: from one more gradient beside x."""
        x, p, lam_g = x.detach(), p.detach(), lam_g.detach()
        uneven = torch.sin(1.0 + 2.4 * torch.arange(x.shape[-1], dtype=x.dtype, device=x.device))
        step = (torch.finfo(x.dtype).eps ** 0.25) * (1.0 + x.abs()) * uneven
        change = self.program.first(x + step, p, lam_g)[0] - gradient.detach()
        curvature = change.abs().amax(-1, keepdim=True) / step.abs().amax(-1, keepdim=True)
        return torch.nan_to_num(curvature, 0.0, 0.0, 0.0)

    @torch.no_grad()
    def unit(self, x: Tensor, p: Tensor, lam_g: Tensor) -> Tensor:
        """A power of two about as large as gradient and curvature at the guess, ``(*batch, 1)``."""
        gradient, _ = self.program.first(x, p, lam_g)
        slope = torch.nan_to_num(gradient.abs().amax(-1, keepdim=True), 0.0, 0.0, 0.0)
        largest = torch.maximum(slope, self.curvature(x, p, lam_g, gradient))
        return torch.where(largest > 0, torch.exp2(torch.log2(largest).round()), torch.ones_like(largest))

    def _row(self, value: Tensor, multiplier: Tensor, scale: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        lower, upper, scaled = lower.expand_as(value), upper.expand_as(value), multiplier * scale
        weight, on_upper = activity_of(value, scaled, lower, upper, self.activity)
        bound = torch.where(on_upper, upper, lower)
        bound = torch.where(weight > 0, bound, torch.zeros_like(bound))  # ∞ · 0 is NaN
        if self.activity == "exact":
            return weight * (value - bound) - (1.0 - weight) * multiplier
        row = weight * (value - bound) - (1.0 - weight) * scaled
        exact, on_upper = activity_of(value, scaled, lower, upper, "exact")
        bound = torch.where(on_upper, upper, lower)
        residual = torch.where(exact > 0, value - torch.where(exact > 0, bound, value), -scaled)
        return row + (residual - row).detach()

    def jacobian(self, z: Tensor, p: Tensor, *bounds: Tensor) -> Tensor:
        """∂F/∂z, ``(*batch, 2n + m, 2n + m)``, from CasADi's exact second derivatives."""
        lbx, ubx, lbg, ubg, unit = bounds
        x, lam_g, lam_x = self.split(z, unit)
        hessian, jacobian = self.program.second(x, p, lam_g)
        n, m = self.program.unknowns, self.program.constraints
        hessian = hessian.reshape(*hessian.shape[: x.ndim - 1], n, n)  # a column is one event dim
        jacobian = jacobian.reshape(*hessian.shape[:-2], m, n)
        with torch.no_grad():
            gradient, g = self.program.first(x, p, lam_g)
        scale = self.scale(x, p, lam_g, lam_x, gradient)
        g_weight, _ = activity_of(g, lam_g * scale, lbg.expand_as(g), ubg.expand_as(g), self.activity)
        x_weight, _ = activity_of(x, lam_x * scale, lbx.expand_as(x), ubx.expand_as(x), self.activity)
        weighing = -unit if self.activity == "exact" else -unit * scale
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(hessian)
        between = torch.zeros_like(jacobian)
        columns = unit.unsqueeze(-1)
        rows = [
            torch.cat([hessian, jacobian.mT * columns, eye * columns], -1),
            torch.cat(
                [g_weight.unsqueeze(-1) * jacobian, torch.diag_embed((1.0 - g_weight) * weighing), between],
                -1,
            ),
            torch.cat(
                [torch.diag_embed(x_weight), between.mT, torch.diag_embed((1.0 - x_weight) * weighing)], -1
            ),
        ]
        return torch.cat(rows, -2)
