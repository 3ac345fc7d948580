"""The Jacobian blocks of a batch of independent systems, checked to be just that."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.jacobians.blocks import (
    check_independent,
    cotangent_basis,
    probe_cotangent,
    refuse_coupled,
    to_blocks,
)
from invlayer_core.jacobians.linearize import Linearization

__all__ = ["per_sample_blocks"]


def per_sample_blocks(linearization: Linearization, *, check: bool = True) -> Tensor:
    """∂F/∂y of every sample, ``(B, m, n)``.

    Parameters
    ----------
    linearization : Linearization
    check : bool
        Send one generic cotangent along with the unit ones, and compare: it costs one more row and
        finds conditions that mix samples, whose blocks would be silently wrong.

    Raises
    ------
    ConditionsError
        If the conditions mix samples.
    """
    system, y, theta = linearization.system, linearization.y, linearization.theta
    if system.jacobian is not None:
        with torch.enable_grad():
            return system.analytic_jacobian(y, theta)
    shape, residual_shape = system.shape, linearization.value.shape
    basis = cotangent_basis(residual_shape, shape.batch, y)
    if not check or shape.count < 2:
        return to_blocks(linearization.rows(basis), shape.batch, shape.size)
    probe = probe_cotangent(residual_shape, y)
    rows = linearization.rows(torch.cat([basis, probe]))
    blocks = to_blocks(rows[:-1], shape.batch, shape.size)
    pulled = rows[-1].reshape(shape.count, shape.size).detach()
    coupled = check_independent(blocks.detach(), probe.reshape(shape.count, -1), pulled)
    if bool(_functorch.plain(coupled).any()):
        raise refuse_coupled(shape.batch, len(shape.event))
    return blocks
