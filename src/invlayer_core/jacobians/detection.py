"""Find the sparsity pattern of a Jacobian by trying: pull unit cotangents back, or let NaN propagate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.blocks import probe_weights
from invlayer_core.jacobians.colouring import colour_groups
from invlayer_core.jacobians.compressed import pulled_chunks
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.jacobians.pattern import SparsityPattern
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["DetectionMethod", "detect_sparsity", "probed_pattern"]

DetectionMethod = Literal["probe", "nan"]


def detect_sparsity(
    f: Callable[..., Tensor],
    y: Tensor,
    args: Any = (),
    *,
    method: DetectionMethod = "probe",
    event_dims: int = 1,
) -> SparsityPattern:
    """Find where ∂f/∂y of one system can be non-zero, by trying; at most about n evaluations, once.

    Keep what it returns and hand it to :class:`~invlayer_core.linear.SparseLU`. Memory is that of the
    entries found and of a few chunks of vectors, never of a dense Jacobian.

    Parameters
    ----------
    f : callable
        ``f(y, *args)``, ``(*batch, *event) -> (*batch, ...)``, every sample treated alone.
    y : Tensor of shape ``(*batch, *event)``
        Where to try; the pattern is the union over the samples.
    args : tuple of pytrees, or one tensor
        What f depends on besides y.
    method : {"probe", "nan"}
        ``"probe"`` pulls groups of equations back through f, at y and at a point beside it, and halves them:
        some log n passes for a stencil, up to about n where every equation depends on much. It *misses* an
        entry that is zero at both points by accident, such as behind a branch not taken there (``relu``,
        ``where``, ``max``). It reports no structural zeros, and works for every f that autograd can
        differentiate.

        ``"nan"`` puts NaN into one unknown after the other and looks where it arrives: n evaluations of f.
        It *misses* what a comparison decides (``where(y > 0, ...)``) and what ``nan_to_num`` removes. It
        *over-reports* products with zero (a dense matrix that holds zeros) and sums over more than is used
        (FFT): still right, but more colours than need be.

        A missed entry does not go unnoticed where it matters: SparseLU compares its values with a generic
        pullback each time it factorises.
    event_dims : int
        The last ``event_dims`` dims of y are one system's unknowns.

    Returns
    -------
    SparsityPattern
        Of shape ``(m, n)``.

    Raises
    ------
    ConditionsError
        For an unknown method, or if f returns something else than one residual per system.

    Examples
    --------
    >>> import torch
    >>> detect_sparsity(lambda y: y**2 - y.roll(1, -1), torch.ones(4)).dense().int()
    tensor([[1, 0, 0, 1],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    if method not in get_args(DetectionMethod):
        raise ConditionsError(f"detect_sparsity(method={method!r}): accepted are 'probe' and 'nan'.")
    system = System(f, Arguments.flatten(args), SystemShape.of(y, event_dims))
    theta, y = [tensor.detach() for tensor in system.theta], y.detach()
    if method == "nan":
        return _spread_of_nan(system, y, theta)
    linearization = linearize(system, y, theta)
    system.check_residual(linearization.value)
    return probed_pattern(linearization)


def probed_pattern(linearization: Linearization) -> SparsityPattern:
    """The union of the non-zeros of J at y and at a point beside it, over all samples."""
    system, y = linearization.system, linearization.y.detach()
    theta = [tensor.detach() for tensor in linearization.theta]
    beside = linearize(system, _beside(y), theta)
    equations = linearization.value.numel() // max(1, system.shape.count)
    found = [_non_zeros(point, equations) for point in (linearization, beside)]
    rows, cols = (torch.cat(index) for index in zip(*found, strict=True))
    return SparsityPattern(rows, cols, (equations, system.shape.size))


def _beside(y: Tensor) -> Tensor:
    """A generic point near y, fixed so that no random state is touched."""
    steps = torch.arange(1, y.numel() + 1, dtype=y.dtype, device=y.device).reshape(y.shape)
    return y + (0.05 + 0.1 * y.abs()) * ((7.0 * steps.sqrt()).frac() - 0.5)


def _non_zeros(linearization: Linearization, equations: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the non-zeros of J, by halving groups of equations.

    A group of equations, pulled back with generic weights, reaches the unknowns that any of them depends
    on. Groups that reach disjoint unknowns are told apart by where they arrive, so that the halves of all
    groups of one colour are pulled back together. For a stencil that takes some log n pullbacks instead of
    n; where groups overlap too much to gain by it, the rest is done equation by equation.
    """
    size = linearization.system.shape.size
    weights = probe_weights(linearization.system.shape.batch, equations, linearization.value)[1]
    length = 1 << max(1, (equations - 1).bit_length())  # of a group; a power of two
    if equations == 0:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    groups, unknowns = torch.zeros(size, dtype=torch.int64), torch.arange(size)
    while length > 1:
        colours, count = colour_groups(groups, unknowns, -(-equations // length))
        parts = 2 if 16 * count < equations else length
        group = torch.arange(equations) // length
        part = torch.arange(equations) % length // (length // parts)
        keys, order = torch.sort(colours[groups] * size + unknowns)
        found = []
        for first, pulled in pulled_chunks(
            linearization, colours[group] * parts + part, count * parts, weights
        ):
            pulled_group, unknown = _reached(pulled)
            pulled_group = pulled_group + first
            key = pulled_group // parts * size + unknown
            place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            known = keys[place] == key  # all, unless NaN spreads in the pullback itself
            parent = groups[order[place]]
            found.append(torch.stack([parent * parts + pulled_group % parts, unknown])[:, known])
        groups, unknowns = torch.cat(found, 1)
        length //= parts
    return groups, unknowns


def _reached(pulled: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``(k, B, n)`` is not zero (or NaN) in some sample, mapped dimensions being further samples."""
    plain = _functorch.plain(pulled)
    group, unknown = (plain != 0).reshape(-1, *pulled.shape).any(0).any(1).nonzero(as_tuple=True)
    return group.cpu(), unknown.cpu()


@torch.no_grad()
def _spread_of_nan(system: System, y: Tensor, theta: list[Tensor]) -> SparsityPattern:
    shape = system.shape
    base = system.residual(y, theta)
    system.check_residual(base)
    blank = base.reshape(shape.count, -1).isnan()
    if bool(blank.any()):
        raise ConditionsError(
            "detect_sparsity(method='nan'): f is NaN at y as it is; accepted is a point where it is finite."
        )
    rows, cols = [], []
    for unknown in range(shape.size):
        point = y.reshape(shape.count, -1).clone()
        point[:, unknown] = torch.nan
        residual = system.residual(point.reshape(shape.full), theta).reshape(shape.count, -1)
        row = residual.isnan().any(0).nonzero().squeeze(-1).cpu()
        rows.append(row)
        cols.append(torch.full_like(row, unknown))
    empty = torch.zeros(0, dtype=torch.int64)
    return SparsityPattern(torch.cat([empty, *rows]), torch.cat([empty, *cols]), (blank.shape[1], shape.size))
