"""The Jacobian blocks of a batch of independent systems, checked to be just that."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.jacobians.blocks import (
    check_independent,
    cotangent_basis,
    coupled_error,
    probe_weights,
    rows_at_once,
    to_blocks,
)
from invlayer_core.jacobians.linearize import Linearization

__all__ = ["blocks_by_columns", "blocks_by_rows", "per_sample_blocks", "refuse_coupled", "weighed_blocks"]


def per_sample_blocks(linearization: Linearization, *, check: bool = False, uneven: bool = False) -> Tensor:
    """∂F/∂y of every sample, ``(B, m, n)``.

    Parameters
    ----------
    linearization : Linearization
    check : bool
        Refuse conditions that mix samples, whose blocks would be silently wrong. It costs one more row.
    uneven : bool
        Weigh the samples by different powers of two on the way, which changes nothing for independent
        ones. If samples mix, the blocks come out wrong in a way that no even cotangent can hide, and a
        pullback of the result shows it: a cheaper check where a pullback is made anyway.

    Raises
    ------
    ConditionsError
        If ``check`` finds that the conditions mix samples.
    """
    system, y, theta = linearization.system, linearization.y, linearization.theta
    if system.jacobian is not None:
        if check:
            refuse_coupled(linearization)
        with torch.enable_grad():
            return system.analytic_jacobian(y, theta)
    if check:
        return to_blocks(_independent_rows(linearization), system.shape.batch, system.shape.size)
    return blocks_by_rows(linearization, uneven=uneven)


def weighed_blocks(linearization: Linearization) -> tuple[Tensor, Tensor | None]:
    """The blocks, each times its sample's power of two, and those powers ``(B, 1)``; None: all are 1.

    The weights are those of ``per_sample_blocks(uneven=True)``, left in: who solves with the blocks weighs
    the right-hand side instead, which is n times smaller.
    """
    system = linearization.system
    if system.jacobian is not None:
        y, theta = linearization.y, linearization.theta
        if not linearization.differentiable:  # nothing to record
            y, theta = y.detach(), [tensor.detach() for tensor in theta]
        with torch.enable_grad():
            return system.analytic_jacobian(y, theta), None
    shape, value = system.shape, linearization.value
    if shape.count < 2:
        return to_blocks(_rows(linearization, _basis(linearization)), shape.batch, shape.size), None
    weights = torch.ones(shape.count, dtype=value.dtype, device=value.device)
    weights[1::3], weights[2::3] = 2.0, 4.0
    events = (1 for _ in range(value.ndim - len(shape.batch)))
    rows = _rows(linearization, _basis(linearization), weights.reshape(*shape.batch, *events))
    return to_blocks(rows, shape.batch, shape.size), weights.unsqueeze(-1)


def _basis(linearization: Linearization) -> Tensor:
    value = linearization.value
    return cotangent_basis(value.shape, linearization.system.shape.batch, value)


def _rows(linearization: Linearization, cotangents: Tensor, weights: Tensor | None = None) -> Tensor:
    """Pull cotangents back, ``(k, *batch, *event)``, each sample's times its weight; a chunk at a time."""
    step = rows_at_once(linearization.value, linearization.system.chunk_size)
    if len(cotangents) <= step:
        return linearization.rows(cotangents if weights is None else cotangents * weights)
    parts = (part if weights is None else part * weights for part in cotangents.split(step))
    return torch.cat([linearization.rows(part) for part in parts])


def blocks_by_rows(linearization: Linearization, *, uneven: bool = False) -> Tensor:
    """The blocks by autograd, whether or not the user gave a Jacobian."""
    shape = linearization.system.shape
    if not uneven or shape.count < 2:
        return to_blocks(_rows(linearization, _basis(linearization)), shape.batch, shape.size)
    blocks, weights = weighed_blocks(linearization)
    return blocks if weights is None else blocks / weights.unsqueeze(-1).to(blocks.dtype)


def blocks_by_columns(linearization: Linearization) -> Tensor:
    """The blocks in forward mode, n passes: cheaper where there are more equations than unknowns."""
    system, shape = linearization.system, linearization.system.shape
    basis = cotangent_basis(shape.full, shape.batch, linearization.y)
    step = rows_at_once(linearization.value, system.chunk_size)
    columns = torch.cat([linearization.columns(part) for part in basis.split(step)])
    return columns.reshape(shape.size, shape.count, -1).movedim(0, 2)


def refuse_coupled(linearization: Linearization) -> None:
    """Raise ``ConditionsError`` if the conditions mix the samples of the batch."""
    if linearization.system.shape.count > 1:
        _independent_rows(linearization)


def _independent_rows(linearization: Linearization) -> Tensor:
    """The rows of the blocks, ``(m, *batch, *event)``, from a pass that also shows whether samples mix."""
    shape, value = linearization.system.shape, linearization.value
    basis = _basis(linearization)
    if shape.count < 2 or shape.size * basis.shape[0] == 0:
        return _rows(linearization, basis)
    m = basis.shape[0]
    samples, equations = probe_weights(shape.batch, m, value)
    probe = (samples.unsqueeze(-1) * equations).reshape(1, *value.shape)
    rows = _rows(linearization, torch.cat([basis, probe]))
    flat = rows.detach().reshape(m + 1, shape.count, shape.size)
    coupled = check_independent(flat[:-1], samples, equations, flat[-1])
    if bool(_functorch.plain(coupled).any()):
        raise coupled_error(shape.batch, len(shape.event))
    return rows[:-1]
