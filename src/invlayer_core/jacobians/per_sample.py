"""The Jacobian blocks of a batch of independent systems, checked to be just that."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.jacobians.blocks import (
    check_independent,
    cotangent_basis,
    probe_weights,
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
    m = basis.shape[0]
    samples, equations = probe_weights(shape.batch, m, y)
    probe = (samples.unsqueeze(-1) * equations).reshape(1, *residual_shape)
    rows = linearization.rows(torch.cat([basis, probe]))
    flat = rows.detach().reshape(m + 1, shape.count, shape.size)
    coupled = check_independent(flat[:-1], samples, equations, flat[-1])
    if bool(_functorch.plain(coupled).any()):
        raise refuse_coupled(shape.batch, len(shape.event))
    return to_blocks(rows[:-1], shape.batch, shape.size)
