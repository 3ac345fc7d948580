"""Inputs and outputs of a CasADi Function as torch tensors: shapes, and what is stored of them.

CasADi stores the structural nonzeros of a matrix, column by column; torch has dense tensors with batch dims
in front. A column of r rows is one event dim, ``(*batch, r)``, a scalar being a column of one; every other
matrix is two, ``(*batch, r, c)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import casadi as ca
import numpy as np
import torch
from torch import Size, Tensor

from invlayer_core import ConditionsError

__all__ = ["Port", "input_ports", "output_ports"]


@final
@dataclass(frozen=True, eq=False)
class Port:
    """One input or output: its name and its sparsity pattern."""

    name: str
    sparsity: ca.Sparsity

    @property
    def event(self) -> tuple[int, ...]:
        """The dims of one sample."""
        rows, columns = self.sparsity.shape
        return (rows,) if columns == 1 else (rows, columns)

    @cached_property
    def _places(self) -> Tensor | None:
        """Where each nonzero is in the event dims, flattened; None if they are one and the same."""
        rows, columns = self.sparsity.get_triplet()
        places = np.asarray(rows, np.int64) * self.sparsity.shape[1] + np.asarray(columns, np.int64)
        if len(places) == self.sparsity.numel() and (places == np.arange(len(places))).all():
            return None
        return torch.from_numpy(places)

    @cached_property
    def _sources(self) -> Tensor | None:
        """Which nonzero each entry is; one past the last for a structural zero."""
        if self._places is None:
            return None
        sources = torch.full((self.sparsity.numel(),), self.sparsity.nnz())
        sources[self._places] = torch.arange(self.sparsity.nnz())
        return sources

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "sparsity": self.sparsity}

    def batch_of(self, tensor: Tensor, called: str) -> Size:
        """The batch dims of a tensor given for this port.

        Raises
        ------
        ConditionsError
            If the shape or dtype does not fit.
        """
        lead = tensor.ndim - len(self.event)
        if lead < 0 or tuple(tensor.shape[lead:]) != self.event or not tensor.is_floating_point():
            raise ConditionsError(
                f"{called}: {self.name!r} came with shape {tuple(tensor.shape)} and dtype {tensor.dtype}; "
                "accepted is a real floating-point tensor of shape "
                f"(*batch, {', '.join(map(str, self.event))})"
                f"{', as unsqueeze(-1) makes one of scalars' if self.event == (1,) else ''}."
            )
        return tensor.shape[:lead]

    def nonzeros(self, tensor: Tensor) -> Tensor:
        """``(*batch, *event) -> (*batch, nnz)``."""
        flat = tensor.reshape(*tensor.shape[: tensor.ndim - len(self.event)], self.sparsity.numel())
        if self._places is None:
            return flat
        return flat.index_select(-1, self._places.to(flat.device))

    def dense(self, nonzeros: Tensor) -> Tensor:
        """``(*batch, nnz) -> (*batch, *event)``."""
        if self._sources is not None:
            padded = torch.cat([nonzeros, torch.zeros_like(nonzeros[..., :1])], dim=-1)
            if not self.sparsity.nnz():
                padded = nonzeros.new_zeros(*nonzeros.shape[:-1], 1)
            nonzeros = padded.index_select(-1, self._sources.to(nonzeros.device))
        return nonzeros.reshape(*nonzeros.shape[:-1], *self.event)


def input_ports(function: ca.Function) -> tuple[Port, ...]:
    """The inputs of a Function."""
    return tuple(Port(function.name_in(i), function.sparsity_in(i)) for i in range(function.n_in()))


def output_ports(function: ca.Function) -> tuple[Port, ...]:
    """The outputs of a Function."""
    return tuple(Port(function.name_out(i), function.sparsity_out(i)) for i in range(function.n_out()))
