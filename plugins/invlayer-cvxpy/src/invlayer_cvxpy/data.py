"""P, q, A and b of a whole batch of programs, from the user's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from invlayer_cvxpy.affine import SparseAffine
from invlayer_cvxpy.canonical import AffineData
from invlayer_cvxpy.parameters import Parameters

__all__ = ["ProgramData"]


@final
class ProgramData:
    """The maps of P, q, A and b, apart by parameters that are batched and parameters that are shared.

    Parameters
    ----------
    data : mapping of AffineData
    parameters : Parameters
    batched : tuple of bool
        Which of the user's parameters are.
    """

    def __init__(
        self, data: Mapping[str, AffineData], parameters: Parameters, batched: tuple[bool, ...]
    ) -> None:
        of_batch = [batched[slot.source] for slot in parameters.slots]
        self.of_batch = of_batch
        columns: dict[bool, list[int]] = {True: [], False: []}
        start = 0
        for slot, is_batched in zip(parameters.slots, of_batch, strict=True):
            columns[is_batched].extend(range(start, start + len(slot.entries)))
            start += len(slot.entries)
        self.shared = {
            name: SparseAffine(each.matrix[:, columns[False]], each.offset) for name, each in data.items()
        }
        self.own = {
            name: SparseAffine(each.matrix[:, columns[True]], 0.0 * each.offset)
            for name, each in data.items()
        }

    def __call__(self, blocks: Sequence[Tensor], like: Tensor) -> dict[str, Tensor]:
        """P, q, A and b from the blocks of θ, each batched only where it depends on a batched parameter."""
        own = [block for block, of_batch in zip(blocks, self.of_batch, strict=True) if of_batch]
        shared = [block for block, of_batch in zip(blocks, self.of_batch, strict=True) if not of_batch]
        vector = torch.cat(shared, -1) if shared else like.new_zeros(0)
        result = {name: each(vector) for name, each in self.shared.items()}
        if own:
            rows = torch.cat(own, -1)
            for name, each in self.own.items():
                if not each.is_constant:
                    result[name] = result[name] + each(rows)
            if all(value.ndim == 1 for value in result.values()):  # batched, but without influence
                result["q"] = result["q"].expand(*rows.shape[:-1], -1)
        return result
