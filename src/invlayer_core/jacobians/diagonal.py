"""The diagonal of a Jacobian, by the cheapest way there is to it."""

from __future__ import annotations

import torch
from torch import Tensor

from invlayer_core.conditions.system import SparseJacobian
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.blocks import cotangent_basis, rows_at_once
from invlayer_core.jacobians.compressed import compressed_values
from invlayer_core.jacobians.linearize import Linearization
from invlayer_core.jacobians.pattern import SparsityPattern

__all__ = ["jacobian_diagonal"]


def jacobian_diagonal(linearization: Linearization, pattern: SparsityPattern | None = None) -> Tensor:
    """The diagonals of the blocks ∂F/∂y, ``(B, n)``, without gradient.

    Parameters
    ----------
    linearization : Linearization
    pattern : SparsityPattern, optional
        Where a block can be non-zero; not looked at where the user's Jacobian gives the diagonal.

    Raises
    ------
    ConditionsError
        If blocks, or the pattern, are not square.
    """
    system = linearization.system
    n, equations = system.shape.size, linearization.value.numel() // max(1, system.shape.count)
    if equations != n or (pattern is not None and pattern.shape != (n, n)):
        raise ConditionsError(
            f"the diagonal of J was asked for with {equations} equations for {n} unknowns"
            f"{'' if pattern is None else f' and {pattern}'}; accepted are as many equations as unknowns, "
            "and a pattern of that size."
        )
    if system.jacobian is not None:
        return _given(linearization)
    if pattern is not None:
        values = compressed_values(linearization, pattern).detach()
        return _of_entries(linearization, values, pattern.rows, pattern.cols)
    return _row_by_row(linearization)


def _given(linearization: Linearization) -> Tensor:
    system = linearization.system
    y, theta = linearization.y.detach(), [tensor.detach() for tensor in linearization.theta]
    if isinstance(system.jacobian, SparseJacobian) and system.jacobian.places is not None:
        entries = system.jacobian.entries(y, *system.arguments.unflatten(theta))
        values = entries.reshape(system.shape.count, -1).detach()
        return _of_entries(linearization, values, *system.jacobian.places)
    return system.analytic_jacobian(y, theta).detach().diagonal(dim1=-2, dim2=-1)


def _of_entries(linearization: Linearization, values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    shape = linearization.system.shape
    here = (rows == cols).nonzero().squeeze(-1).to(values.device)
    places = cols.to(values.device)[here]
    return values.new_zeros(shape.count, shape.size).index_copy(1, places, values[:, here])


def _row_by_row(linearization: Linearization) -> Tensor:
    """Of every row one entry, a chunk of rows at a time: no block is ever there as a whole."""
    system, value = linearization.system, linearization.value
    shape, step = system.shape, rows_at_once(value, system.chunk_size)
    parts = []
    for k, part in enumerate(cotangent_basis(value.shape, shape.batch, value).split(step)):
        rows = linearization.rows(part).detach().reshape(len(part), shape.count, shape.size)
        parts.append(rows.diagonal(offset=k * step, dim1=0, dim2=2))
    return torch.cat(parts, dim=-1)
