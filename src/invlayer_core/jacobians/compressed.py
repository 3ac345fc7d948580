"""The values of a sparse Jacobian from one pullback per colour, for the whole batch at once.

Equations of one colour share no unknown, so that their unit cotangents can be pulled back in one sum: what
arrives at unknown j belongs to the one equation of that colour that depends on j (Curtis, Powell & Reid
1974). Where columns need fewer colours than rows, pushforwards do the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import SparseJacobian, System
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.blocks import batched_rows, coupled_error, probe_weights, rows_at_once
from invlayer_core.jacobians.linearize import Linearization, RecordedLinearization
from invlayer_core.jacobians.pattern import SparsityPattern

__all__ = [
    "check_explains",
    "compressed_values",
    "given_entries",
    "known_entries",
    "pull",
    "pulled_chunks",
    "push",
]


def pull(linearization: Linearization, cotangent: Tensor) -> Tensor:
    """``Jᵀ cotangent``, ``(B, m) -> (B, n)``, also of conditions that do not depend on y at all."""
    if _is_constant(linearization):
        return cotangent.new_zeros(cotangent.shape[0], linearization.system.shape.size)
    return linearization.pull_y(cotangent)


def push(linearization: Linearization, tangent: Tensor) -> Tensor:
    """``J tangent``, ``(B, n) -> (B, m)``, also of conditions that do not depend on y at all."""
    if _is_constant(linearization):
        return linearization.value.new_zeros(
            tangent.shape[0], linearization.value.numel() // tangent.shape[0]
        )
    return linearization.push_y(tangent)


def _is_constant(linearization: Linearization) -> bool:
    return isinstance(linearization, RecordedLinearization) and not linearization.value.requires_grad


def pulled_chunks(
    linearization: Linearization, groups: Tensor, count: int, weights: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Pull back the sum of each group of equations: ``(first group, (k, B, n))``, a few groups at a time.

    Parameters
    ----------
    linearization : Linearization
    groups : Tensor of int64, shape ``(m,)``
        The group of every equation.
    count : int
        Number of groups.
    weights : Tensor of shape ``(m,)``, optional
        Of each equation in the sum; all 1 by default.
    """
    shape, value = linearization.system.shape, linearization.value
    batch, event = shape.batch, value.shape[len(shape.batch) :]
    step = rows_at_once(value, linearization.system.chunk_size)
    for first in range(0, count, step):
        wanted = torch.arange(first, min(first + step, count), device=value.device)
        sums = (groups.to(value.device) == wanted.unsqueeze(-1)).to(value.dtype)
        if weights is not None:
            sums = sums * weights
        cotangents = sums.reshape(len(wanted), *(1 for _ in batch), *event).expand(len(wanted), *value.shape)
        yield first, _pull_back(linearization, cotangents).reshape(len(wanted), shape.count, shape.size)


def _pull_back(linearization: Linearization, cotangents: Tensor) -> Tensor:
    if isinstance(linearization, RecordedLinearization):
        return batched_rows(linearization.value, [linearization.y], cotangents, create_graph=False)[0]
    return linearization.rows(cotangents)


def compressed_values(linearization: Linearization, pattern: SparsityPattern) -> Tensor:
    """The entries of J that ``pattern`` names, ``(B, nnz)``, without gradient.

    Parameters
    ----------
    linearization : Linearization
    pattern : SparsityPattern
        What it does not name is taken to be zero: see :func:`check_explains`.
    """
    known = known_entries(linearization, pattern)
    if known is not None:
        return known
    device = linearization.y.device
    rows, cols = pattern.rows.to(device), pattern.cols.to(device)
    if _columns_are_cheaper(pattern):
        return _by_columns(linearization, pattern, rows, cols)
    colours, count = pattern.row_colouring
    colour_of = colours.to(device)[rows]
    parts, places = [], []
    for first, pulled in pulled_chunks(linearization, colours, count):
        if pulled.shape[0] == count:  # all in one chunk
            return pulled[colour_of, :, cols].T
        here = ((colour_of >= first) & (colour_of < first + pulled.shape[0])).nonzero().squeeze(-1)
        parts.append(pulled[colour_of[here] - first, :, cols[here]])  # (entries, B)
        places.append(here)
    if not parts:
        return linearization.y.new_zeros(linearization.system.shape.count, 0)
    return torch.cat(parts)[torch.argsort(torch.cat(places))].T


def known_entries(linearization: Linearization, pattern: SparsityPattern) -> Tensor | None:
    """The entries that the user's Jacobian gives itself, if it does, at just these places."""
    theta = [tensor.detach() for tensor in linearization.theta]
    return given_entries(linearization.system, linearization.y.detach(), theta, pattern)


def given_entries(
    system: System, y: Tensor, theta: Sequence[Tensor], pattern: SparsityPattern
) -> Tensor | None:
    """The same at a point where F itself need not be evaluated."""
    if not isinstance(system.jacobian, SparseJacobian) or system.jacobian.places is None:
        return None
    if not pattern.has_places(*system.jacobian.places):
        return None
    entries = system.jacobian.entries(y, *system.arguments.unflatten(theta))
    return entries.reshape(system.shape.count, pattern.nnz)


def _columns_are_cheaper(pattern: SparsityPattern) -> bool:
    # The most entries in one column bound the row colours from below, those in one row the column colours.
    # A pushforward takes two passes to a pullback's one, hence the factor.
    if pattern.nnz == 0:
        return False
    in_column, in_row = int(pattern.cols.bincount().max()), int(pattern.rows.bincount().max())
    if in_column <= 4 * in_row:
        return False
    return pattern.row_colouring.number > 2 * pattern.column_colouring.number


def _by_columns(linearization: Linearization, pattern: SparsityPattern, rows: Tensor, cols: Tensor) -> Tensor:
    shape = linearization.system.shape
    colours, count = pattern.column_colouring
    colours = colours.to(rows.device)
    values: list[Tensor] = []
    places: list[Tensor] = []
    for colour in range(count):
        mask = (colours == colour).to(linearization.y.dtype)
        pushed = push(linearization, mask.expand(shape.count, shape.size))
        here = (colours[cols] == colour).nonzero().squeeze(-1)
        values.append(pushed[:, rows[here]])
        places.append(here)
    return torch.cat(values, 1)[:, torch.argsort(torch.cat(places))]


def check_explains(linearization: Linearization, pattern: SparsityPattern, values: Tensor, name: str) -> None:
    """Refuse a pattern that misses entries of J: its values must give one generic pullback.

    The cotangent has a weight of its own for each equation and sample, so that what compression has added
    up in the wrong place, or left out, shows at the unknown where it belongs. Rounding is told from that
    by the sizes of the terms. A sample whose J holds NaN is not judged.

    Raises
    ------
    ConditionsError
        Naming the sample and the unknown where it shows; or that the conditions mix samples.
    """
    shape, device = linearization.system.shape, values.device
    rows, cols = pattern.rows.to(device), pattern.cols.to(device)
    samples, equations = probe_weights(shape.batch, pattern.shape[0], values)
    cotangent = samples.unsqueeze(-1) * equations
    pulled = pull(linearization, cotangent)
    terms = values * cotangent[:, rows]
    expected = torch.zeros_like(pulled).index_add(1, cols, terms)
    gap = (pulled - expected).abs()
    size = torch.zeros_like(pulled).index_add(1, cols, terms.abs()) + pulled.abs()
    # Beside the largest column: in F itself larger terms may have cancelled than those that are left.
    allowed = 1e3 * torch.finfo(values.dtype).eps * (size + 1e-3 * size.amax(-1, keepdim=True))
    wrong = (gap > allowed) & pulled.isfinite() & expected.isfinite()
    plain = _functorch.plain(wrong).reshape(-1, shape.count, shape.size)
    if not bool(plain.any()):
        return
    if _mixes_samples(linearization, cotangent):
        raise coupled_error(shape.batch, len(shape.event))
    _, sample, unknown = plain.nonzero()[0].tolist()
    raise ConditionsError(
        f"{name} misses entries of the Jacobian: in sample {sample}, column {unknown} of J (its unknown "
        f"{unknown}) is not what the pattern's {pattern.nnz} entries explain. Accepted is a pattern that "
        "names every entry that can be non-zero, with equations as rows and unknowns as columns; "
        "inv.jacobians.detect_sparsity(f, y, args) finds one."
    )


def _mixes_samples(linearization: Linearization, cotangent: Tensor) -> bool:
    if cotangent.shape[0] < 2:
        return False
    first = torch.zeros_like(cotangent)
    first[0] = 1.0
    pulled = _functorch.plain(pull(linearization, cotangent * first))
    return bool((pulled.reshape(-1, *cotangent.shape[:1], pulled.shape[-1])[:, 1:] != 0).any())
