"""Where the Jacobian of one system can be non-zero: its sparsity pattern, shared by all samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.colouring import Colouring, colour_groups

__all__ = ["SparsityPattern"]


@final
@dataclass(frozen=True, eq=False)
class SparsityPattern:
    """The places of one system's Jacobian, m × n, that may be non-zero.

    Entries are kept column by column (CSC order), each once, on the CPU. What is derived from them, such as
    the colouring, is worked out on first use and kept with the pattern: make one pattern and use it for many
    calls. Patterns compare and hash by their content.

    Parameters
    ----------
    rows, cols : Tensor of integers, shape ``(nnz,)``
        Equation and unknown of each entry; repeated entries count once.
    shape : tuple of int
        ``(m, n)``: equations, unknowns.

    Raises
    ------
    ConditionsError
        If indices and shape do not fit.

    Examples
    --------
    >>> import torch
    >>> pattern = SparsityPattern.of(torch.eye(3, dtype=torch.bool))
    >>> pattern.nnz, pattern.row_colouring.number
    (3, 1)
    """

    rows: Tensor
    cols: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        shape = _checked_shape(self.shape)
        rows, cols = (
            _checked_indices("rows", self.rows, shape[0]),
            _checked_indices("cols", self.cols, shape[1]),
        )
        if rows.shape != cols.shape:
            raise ConditionsError(
                f"SparsityPattern: rows has {rows.numel()} entries and cols {cols.numel()}; accepted is one "
                "row and one column index for each entry."
            )
        flat = torch.unique(cols * shape[0] + rows)  # sorted: column by column
        object.__setattr__(self, "rows", flat % max(shape[0], 1))
        object.__setattr__(self, "cols", flat // max(shape[0], 1))
        object.__setattr__(self, "shape", shape)

    @classmethod
    def of(cls, source: Any, shape: tuple[int, int] | None = None) -> SparsityPattern:
        """Read a pattern from what is at hand.

        Parameters
        ----------
        source : SparsityPattern, Tensor or pair of index tensors
            A sparse tensor (COO, CSR or CSC, whose stored entries count, whatever their values); a dense
            ``bool`` tensor ``(m, n)``; or a pair of index tensors, which needs ``shape``.
        shape : tuple of int, optional
            ``(m, n)``, for a pair of index tensors.

        Raises
        ------
        ConditionsError
            For anything else.

        Examples
        --------
        >>> import torch
        >>> SparsityPattern.of((torch.tensor([0, 1]), torch.tensor([1, 0])), shape=(2, 2))
        SparsityPattern(2 x 2, 2 entries)
        """
        if isinstance(source, SparsityPattern):
            return source
        if isinstance(source, Tensor):
            return cls(*_indices_of(source), (source.shape[0], source.shape[1]))
        if isinstance(source, (tuple, list)) and len(source) == 2 and shape is not None:
            rows, cols = (torch.as_tensor(index) for index in source)
            return cls(rows, cols, shape)
        raise ConditionsError(
            f"SparsityPattern.of({_named(source)}, shape={shape}): accepted are a sparse COO, CSR or CSC "
            "tensor, a dense bool tensor (m, n), or (rows, cols) index tensors with shape=(m, n)."
        )

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.rows.numel()

    @cached_property
    def column_pointers(self) -> Tensor:
        """Where each column begins among the entries, ``(n + 1,)``: with ``rows``, the CSC index arrays."""
        counts = torch.bincount(self.cols, minlength=self.shape[1])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def row_colouring(self) -> Colouring:
        """Equations in groups that share no unknown: one pullback gives all rows of a group."""
        return colour_groups(self.rows, self.cols, self.shape[0])

    @cached_property
    def column_colouring(self) -> Colouring:
        """Unknowns in groups that share no equation: one pushforward gives all columns of a group."""
        return colour_groups(self.cols, self.rows, self.shape[1])

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether (i, j) is an entry wherever (j, i) is one."""
        m, n = self.shape
        flat, mirrored = self.cols * m + self.rows, torch.sort(self.rows * n + self.cols).values
        return m == n and torch.equal(flat, mirrored)

    def has_places(self, rows: Tensor, cols: Tensor) -> bool:
        """Whether its entries are just these, in this order."""
        same = rows is self.rows and cols is self.cols
        return same or (torch.equal(rows, self.rows) and torch.equal(cols, self.cols))

    def product(self, values: Tensor, vectors: Tensor) -> Tensor:
        """``(..., nnz)`` entries times ``(..., n)``: ``(..., m)``."""
        rows, cols = self.rows.to(vectors.device), self.cols.to(vectors.device)
        terms = values * vectors.index_select(-1, cols)
        return terms.new_zeros(*terms.shape[:-1], self.shape[0]).index_add(-1, rows, terms)

    def dense(self) -> Tensor:
        """The pattern as a bool tensor ``(m, n)``."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask[self.rows, self.cols] = True
        return mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return (
            self.shape == other.shape
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.cols, other.cols)
        )

    def __hash__(self) -> int:
        # Two patterns of one size rarely agree in this sum, and equality has the last word.
        position = torch.arange(1, self.nnz + 1)
        return hash((self.shape, self.nnz, int((position * (self.rows + 3 * self.cols)).sum())))

    def __repr__(self) -> str:
        return f"SparsityPattern({self.shape[0]} x {self.shape[1]}, {self.nnz} entries)"


def _checked_shape(shape: Any) -> tuple[int, int]:
    if not (isinstance(shape, (tuple, list)) and len(shape) == 2 and all(_is_size(size) for size in shape)):
        raise ConditionsError(
            f"SparsityPattern: shape={shape!r}; accepted is (m, n), the numbers of equations and unknowns."
        )
    return int(shape[0]), int(shape[1])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_indices(name: str, index: Any, size: int) -> Tensor:
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype == torch.bool or _is_real(index):
        raise ConditionsError(
            f"SparsityPattern: {name} is {_named(index)}; accepted is a vector of integer indices."
        )
    index = index.detach().to("cpu", torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ConditionsError(
            f"SparsityPattern: {name} holds indices from {int(index.min())} to {int(index.max())}; accepted "
            f"are 0 to {size - 1} for this shape."
        )
    return index


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _indices_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    if tensor.ndim != 2 or (tensor.layout == torch.strided and tensor.dtype != torch.bool):
        raise ConditionsError(
            f"SparsityPattern.of({_named(tensor)}): accepted is one system's pattern (m, n), as a sparse "
            "tensor or a dense bool one; for a matrix of numbers write matrix != 0."
        )
    if tensor.layout == torch.strided:
        rows, cols = tensor.nonzero(as_tuple=True)
        return rows, cols
    coo = tensor.detach() if tensor.layout == torch.sparse_coo else tensor.detach().to_sparse_coo()
    rows, cols = (coo if coo.is_coalesced() else coo.coalesce()).indices()
    return rows, cols


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        return f"a {layout} tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"
