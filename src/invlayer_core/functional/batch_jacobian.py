"""The Jacobian of every sample of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.inputs import check_unknown
from invlayer_core.jacobians.blocks import check_chunk_size, full_jacobian_blocks, rows_at_once
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["batch_jacobian"]


def batch_jacobian(
    f: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    method: Literal["fast", "full"] = "fast",
    create_graph: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """∂f_b/∂y_b for every sample b of a batch, in one reverse pass per output.

    Parameters
    ----------
    f : callable
        ``(B, *event) -> (B, *out)``, whole-tensor, every sample treated alone.
    y : Tensor of shape ``(B, *event)``
    method : {"fast", "full"}
        ``"fast"`` pulls one unit vector back for all samples at once. ``"full"`` takes the whole
        ``(B, m, B, n)`` Jacobian, at B times the cost, and needs no independence to be right on the
        diagonal. Both agree for independent samples; for others ``"fast"`` raises.
    create_graph : bool
        Whether the result is itself differentiable.
    chunk_size : int, optional
        Most rows that are pulled back in one pass, to bound memory; by default what caches hold.

    Returns
    -------
    Tensor of shape ``(B, m, n)``

    Raises
    ------
    ConditionsError
        If f mixes samples (``"fast"``), or returns something else than one row per sample, or for a
        ``chunk_size`` below 1.

    Examples
    --------
    >>> import torch
    >>> batch_jacobian(lambda y: y**2, torch.tensor([[1.0, 2.0]]))
    tensor([[[2., 0.],
             [0., 4.]]])
    """
    check_unknown("batch_jacobian", "y", y)
    check_chunk_size("batch_jacobian", chunk_size)
    if y.ndim == 0:
        raise ConditionsError("batch_jacobian: y has shape (); accepted is (B, *event), the batch first.")
    shape = SystemShape.of(y, y.ndim - 1)
    system = System(f, Arguments.flatten(()), shape, chunk_size=chunk_size)
    linearization = linearize(system, y, (), create_graph=create_graph)
    linearization.system.check_residual(linearization.value)
    if method == "full":
        value = linearization.value
        step = rows_at_once(value, chunk_size)
        return full_jacobian_blocks(linearization.rows, value, shape.batch, shape.size, step)
    if method != "fast":
        raise ConditionsError(f"batch_jacobian(method={method!r}): accepted are 'fast' and 'full'.")
    return per_sample_blocks(linearization, check=True)
