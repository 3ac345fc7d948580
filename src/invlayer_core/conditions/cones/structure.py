"""Which cone, and where P and A can be non-zero: what all programs of a batch have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.product import Cones
from invlayer_core.errors import ConditionsError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ConeStructure", "RowsOfGroup"]

_DENSE = 200  # unknowns of (x, v) up to which the Jacobian is best given by dense blocks


@final
class RowsOfGroup(NamedTuple):
    """The entries of A in the rows of one group of cones, and the cone and the row within it of each."""

    entry: Tensor
    cone: Tensor
    row: Tensor


@final
@dataclass(frozen=True, eq=False)
class ConeStructure:
    """Which cone, and where P and A can be non-zero: what all programs of a batch have in common.

    Parameters
    ----------
    size : int
        n, the number of variables.
    cones : Cones
        K, for vectors of m entries.
    P : pair of Tensor
        Rows and columns of the entries of the upper triangle of P, ``(nnz,)`` each, each entry once.
    A : pair of Tensor
        Rows and columns of the entries of A, m × n.

    Attributes
    ----------
    groups : tuple of RowsOfGroup
        One for each of ``cones.groups``.
    places : pair of Tensor, or None
        Rows and columns of the Jacobian of the conditions, column by column, where it is large.
    order : Tensor, or None
        Which place each of the parts belongs to that :class:`ConeJacobian` makes the entries of.

    Raises
    ------
    ConditionsError
        If indices are out of range, or P has entries below its diagonal.

    Examples
    --------
    >>> ConeStructure.dense(size=2, cones=Cones(nonneg=3))
    ConeStructure(n = 2, m = 3, 3 + 6 entries)
    """

    size: int
    cones: Cones
    P: tuple[Tensor, Tensor]
    A: tuple[Tensor, Tensor]
    groups: tuple[RowsOfGroup, ...] = field(init=False, repr=False)
    places: tuple[Tensor, Tensor] | None = field(init=False, repr=False)
    order: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, rows in (("P", self.size), ("A", self.equations)):
            index = getattr(self, name)
            for part, limit in zip(index, (rows, self.size), strict=True):
                if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < limit:
                    raise ConditionsError(
                        f"ConeStructure: {name} has indices from {int(part.min())} to {int(part.max())}; "
                        f"accepted are 0 to {limit - 1}."
                    )
        if bool((self.P[0] > self.P[1]).any()):
            raise ConditionsError(
                "ConeStructure: P has entries below its diagonal; accepted is the upper triangle."
            )
        # Now, and not on first use: that may be under torch.func, which would wrap the index tensors.
        object.__setattr__(self, "groups", self._rows_of_groups())
        places, order = self._layout() if self._is_large() else (None, None)
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "order", order)

    def _rows_of_groups(self) -> tuple[RowsOfGroup, ...]:
        found = []
        for group in self.cones.groups:
            count, k = group.entries.shape
            cone, row = torch.full((self.equations,), -1), torch.zeros(self.equations, dtype=torch.int64)
            cone[group.entries] = torch.arange(count).unsqueeze(-1).expand(count, k)
            row[group.entries] = torch.arange(k).expand(count, k)
            entry = (cone[self.A[0]] >= 0).nonzero().squeeze(-1)
            rows = self.A[0][entry]
            found.append(RowsOfGroup(entry, cone[rows], row[rows]))
        return tuple(found)

    def _is_large(self) -> bool:
        """Whether the entries of the Jacobian are worth naming one by one."""
        total = self.size + self.equations
        count = 2 * self.P[0].numel() + self.A[0].numel() + total
        for group, rows in zip(self.cones.groups, self.groups, strict=True):
            count += group.family.size * (rows.entry.numel() + group.entries.numel())
        return total > _DENSE and count < total**2

    def _layout(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        n, (up, across), (rows, cols) = self.size, self.P, self.A
        below = (up != across).nonzero().squeeze(-1)
        own = torch.arange(n + self.equations)  # the whole diagonal, for who wants to regularise it
        pairs = [(up, across), (across[below], up[below]), (n + rows, cols), (own, own)]
        for group, (entry, cone, _) in zip(self.cones.groups, self.groups, strict=True):
            entries = n + group.entries
            if group.family.diagonal:
                pairs += [(cols[entry], n + rows[entry]), (entries.flatten(), entries.flatten())]
                continue
            count, k = entries.shape
            pairs.append((cols[entry].repeat_interleave(k), entries[cone].flatten()))
            first = entries.unsqueeze(-1).expand(count, k, k).flatten()
            pairs.append((first, entries.unsqueeze(-2).expand(count, k, k).flatten()))
        size = n + self.equations
        flat, order = torch.unique(
            torch.cat([column * size + row for row, column in pairs]), return_inverse=True
        )
        return (flat % size, flat // size), order

    @classmethod
    def dense(cls, size: int, cones: Cones) -> ConeStructure:
        """Every entry of P and A can be non-zero; those of A row by row."""
        rows, cols = torch.triu_indices(size, size)
        m = cones.size
        places = torch.arange(m * size)
        return cls(size, cones, (rows, cols), (places // max(size, 1), places % max(size, 1)))

    def compressed(self, name: Literal["P", "A"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and column pointers of the CSC form, and the order of the entries in it; NumPy, int64."""
        if name not in self._compressed:
            rows, cols = getattr(self, name)
            order = torch.argsort(cols * max(self.size, self.equations, 1) + rows)
            counts = torch.bincount(cols, minlength=self.size).cumsum(0)
            pointers = torch.cat([counts.new_zeros(1), counts])
            self._compressed[name] = (rows[order].numpy(), pointers.numpy(), order.numpy())
        return self._compressed[name]

    @cached_property
    def _compressed(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return {}

    @property
    def equations(self) -> int:
        """m, the number of entries of a vector in K."""
        return self.cones.size

    def __repr__(self) -> str:
        entries = f"{self.P[0].numel()} + {self.A[0].numel()} entries"
        return f"ConeStructure(n = {self.size}, m = {self.equations}, {entries})"
