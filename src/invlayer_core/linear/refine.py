"""When Jᵀw = ȳ does not hold to the digits it should: find out why, and refine.

The pullback of w through F itself is compared with the cotangent. A gap has one of three reasons: the
conditions mix samples, so that there are no blocks; the user's Jacobian is not that of F; or J is so
ill-conditioned that rounding shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.jacobians.per_sample import blocks_by_rows, refuse_coupled
from invlayer_core.linear.lu import lu_factor, lu_solve

__all__ = ["explain_inaccurate", "is_lost", "refine"]

_REFINEMENTS = 2
_JACOBIAN_ERROR = 1e-6  # relative; float32 gets the square root of its rounding error


def explain_inaccurate(linearization: Linearization, blocks: Tensor) -> None:
    """Raise if the gap has a reason that refinement cannot mend.

    Raises
    ------
    ConditionsError
        If the conditions mix samples, or if ``jacobian=`` is not the Jacobian of the conditions.
    """
    refuse_coupled(linearization)
    if linearization.system.jacobian is None:
        return
    exact = blocks_by_rows(linearization).detach()
    error = (blocks.detach() - exact).abs().amax((-2, -1))
    allowed = max(_JACOBIAN_ERROR, torch.finfo(exact.dtype).eps ** 0.5) * exact.abs().amax((-2, -1))
    wrong = _functorch.plain(error > allowed).reshape(-1)
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        raise ConditionsError(
            f"jacobian= is not the Jacobian of the conditions: in sample {sample} it differs from autograd's "
            f"by {float(_functorch.plain(error).reshape(-1)[sample]):.2g}. Accepted is ∂F/∂y (y, *args) of "
            "shape (*batch, n, n), rows first; leave jacobian= out to let autograd make it."
        )


def refine(blocks: Tensor, weights: Tensor, rhs: Tensor) -> Tensor:
    """Iterative refinement of Jᵀw = rhs with the factors of J (Higham 2002, chapter 12).

    Where elimination itself has lost the digits (its growth can be 2ⁿ⁻¹), refinement cannot bring them
    back: there the singular value decomposition answers.
    """
    factors = lu_factor(blocks.detach())
    for _ in range(_REFINEMENTS):
        correction = lu_solve(blocks, _missing(blocks, weights, rhs), factors, transpose=True)
        # A sample without a regular block has been answered by a policy, and is left alone.
        weights = weights + torch.where(correction.isfinite().all(-1, keepdim=True), correction, 0.0)
    lost = is_lost(blocks, weights, rhs)
    if not bool(_functorch.plain(lost).any()):
        return weights
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    stable = torch.linalg.pinv(torch.where(lost[..., None, None], blocks, identity))
    return torch.where(lost.unsqueeze(-1), (stable.mT @ rhs.unsqueeze(-1)).squeeze(-1), weights)


def _missing(blocks: Tensor, weights: Tensor, rhs: Tensor) -> Tensor:
    return rhs - (blocks.mT @ weights.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def is_lost(blocks: Tensor, weights: Tensor, rhs: Tensor) -> Tensor:
    """Samples ``(B,)`` whose residual is large beside the terms it is made of: a backward unstable solve."""
    terms = (blocks.abs().mT @ weights.abs().unsqueeze(-1)).squeeze(-1) + rhs.abs()
    allowed = 100.0 * blocks.shape[-1] * torch.finfo(rhs.dtype).eps * terms.amax(-1)
    return _missing(blocks, weights, rhs).abs().amax(-1) > allowed
