"""The Karush–Kuhn–Tucker conditions of a nonlinear program with two-sided constraints, as a square system.

With z = (x, λ, ν), the multipliers λ of lbg ≤ g ≤ ubg and ν of lbx ≤ x ≤ ubx, and c one of g, x with its μ,

    F(z) = [ ∇ₓf + ∂gᵀλ + ν ;  c − Π(c + s μ) ],      Π the projection on [lower, upper].

The second row is the *natural residual* (Facchinei & Pang 2003, section 1.5): zero exactly where c is within
its bounds and μ has the sign that goes with the bound that is attained. It is c − upper where c + s μ > upper,
c − lower where c + s μ < lower, and −s μ in between: the primal–dual test of the active set (Hintermüller, Ito
& Kunisch 2002), for one multiplier of two bounds. s makes μ a length, whatever the units of f: ``scale_of``.

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


def scale_of(lam_g: Tensor, lam_x: Tensor, magnitude: Tensor) -> Tensor:
    """s of every sample, ``(*batch, 1)``, as a constant: 1 over the magnitude and the largest multiplier.

    A multiplier over the curvature of the Lagrangian is a length, as a slack is: how far x would move if the
    constraint went. ``magnitude`` is that curvature, at the guess, where it costs one evaluation for a call.
    """
    largest = torch.cat([lam_g.abs(), lam_x.abs(), magnitude], -1).detach().amax(-1, keepdim=True)
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
    """``F(z, p, lbx, ubx, lbg, ubg, magnitude)``, zero at a minimum with its multipliers."""

    program: NlpProgram
    activity: Activity = "exact"

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z ``(*batch, 2n + m)`` as x, λ and ν."""
        n = self.program.unknowns
        x, lam_g, lam_x = z.split([n, self.program.constraints, n], -1)
        return x, lam_g, lam_x

    def __call__(self, z: Tensor, p: Tensor, *bounds: Tensor) -> Tensor:
        x, lam_g, lam_x = self.split(z)
        lbx, ubx, lbg, ubg, magnitude = bounds
        gradient, g = self.program.first(x, p, lam_g)
        scale = scale_of(lam_g, lam_x, magnitude)
        return torch.cat(
            [gradient + lam_x, self._row(g, lam_g * scale, lbg, ubg), self._row(x, lam_x * scale, lbx, ubx)],
            -1,
        )

    def _row(self, value: Tensor, scaled: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        lower, upper = lower.expand_as(value), upper.expand_as(value)
        weight, on_upper = activity_of(value, scaled, lower, upper, self.activity)
        bound = torch.where(on_upper, upper, lower)
        bound = torch.where(weight > 0, bound, torch.zeros_like(bound))  # ∞ · 0 is NaN
        row = weight * (value - bound) - (1.0 - weight) * scaled
        if self.activity == "exact":
            return row
        exact, on_upper = activity_of(value, scaled, lower, upper, "exact")
        bound = torch.where(on_upper, upper, lower)
        residual = torch.where(exact > 0, value - torch.where(exact > 0, bound, value), -scaled)
        return row + (residual - row).detach()

    def jacobian(self, z: Tensor, p: Tensor, *bounds: Tensor) -> Tensor:
        """∂F/∂z, ``(*batch, 2n + m, 2n + m)``, from CasADi's exact second derivatives."""
        x, lam_g, lam_x = self.split(z)
        lbx, ubx, lbg, ubg, magnitude = bounds
        scale = scale_of(lam_g, lam_x, magnitude)
        hessian, jacobian = self.program.second(x, p, lam_g)
        jacobian = jacobian.reshape(*x.shape[:-1], self.program.constraints, self.program.unknowns)
        with torch.no_grad():
            _, g = self.program.first(x, p, lam_g)
        g_weight, _ = activity_of(g, lam_g * scale, lbg.expand_as(g), ubg.expand_as(g), self.activity)
        x_weight, _ = activity_of(x, lam_x * scale, lbx.expand_as(x), ubx.expand_as(x), self.activity)
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(hessian)
        between = torch.zeros_like(jacobian)
        rows = [
            torch.cat([hessian, jacobian.mT, eye], -1),
            torch.cat(
                [g_weight.unsqueeze(-1) * jacobian, torch.diag_embed(-(1.0 - g_weight) * scale), between], -1
            ),
            torch.cat(
                [torch.diag_embed(x_weight), between.mT, torch.diag_embed(-(1.0 - x_weight) * scale)], -1
            ),
        ]
        return torch.cat(rows, -2)
