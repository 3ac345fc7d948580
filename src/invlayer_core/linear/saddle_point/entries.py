"""One sample's matrices by their entries, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram
from invlayer_core.matrices import MatrixForm, SparseForm

__all__ = ["Entries", "apply_entries", "row_entries", "symmetric_entries", "transposed"]


@final
@dataclass(frozen=True, eq=False)
class Entries:
    """A sparse matrix by its entries."""

    row: Tensor
    column: Tensor
    value: Tensor


def _entries(form: MatrixForm, held: Tensor) -> Entries:
    if isinstance(form, SparseForm):
        return Entries(form.row.cpu(), form.column.cpu(), held.to("cpu", torch.float64))
    host = held.to("cpu", torch.float64)
    row, column = host.nonzero(as_tuple=True)
    return Entries(row, column, host[row, column])


def symmetric_entries(program: QuadraticProgram) -> Entries:
    """½ (P + Pᵀ)."""
    n = program.layout.size
    if "P" not in program.tensors:
        return _no_entries()
    P = _entries(program.layout.forms["P"], program.tensors["P"])
    if torch.equal(P.row, P.column):
        return P
    keys = torch.cat([P.row * n + P.column, P.column * n + P.row])
    places, slot = keys.unique(return_inverse=True)
    value = torch.zeros(len(places), dtype=torch.float64)
    value.index_add_(0, slot, 0.5 * torch.cat([P.value, P.value]))
    return Entries(places // n, places % n, value)


def row_entries(program: QuadraticProgram) -> Entries:
    """A above G, one sample."""
    parts, first = [], 0
    for name in ("A", "G"):
        if name in program.tensors:
            form = program.layout.forms[name]
            part = _entries(form, program.tensors[name])
            parts.append(Entries(part.row + first, part.column, part.value))
            first += form.rows
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _no_entries()
    return Entries(*(torch.cat([getattr(p, f) for p in parts]) for f in ("row", "column", "value")))


def _no_entries() -> Entries:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Entries(nothing, nothing, torch.zeros(0, dtype=torch.float64))


def apply_entries(matrix: Entries, vectors: Tensor, rows: int) -> Tensor:
    """``(V, n) -> (V, rows)``."""
    picked = matrix.value * vectors.index_select(-1, matrix.column)
    return vectors.new_zeros(len(vectors), rows).index_add_(-1, matrix.row, picked)


def transposed(matrix: Entries) -> Entries:
    """Rows and columns exchanged."""
    return Entries(matrix.column, matrix.row, matrix.value)
