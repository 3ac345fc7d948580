"""Which entry of the output, and which input, belongs to which sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Size, Tensor

__all__ = ["Layout"]


@final
@dataclass(frozen=True)
class Layout:
    """Batch dims, and who has them.

    Attributes
    ----------
    batch : torch.Size
    owner : Tensor of int64, shape ``(N,)``
        The sample of every entry of the flat output; -1 for entries of no single sample.
    batched : tuple of int
        Inputs with one slice per sample.
    ambiguous : tuple of int
        Inputs that have the batch's shape, but also that of one sample (B = n): left out of the probes.
    """

    batch: Size
    owner: Tensor
    batched: tuple[int, ...]
    ambiguous: tuple[int, ...]

    @property
    def count(self) -> int:
        """B, the number of samples."""
        return self.batch.numel()

    @classmethod
    def read(cls, batch: Size | None, outputs: Sequence[Tensor], arguments: Sequence[Tensor]) -> Layout:
        """Match shapes with the implicit layer's ``batch``; without one (None), dim 0 if all share it."""
        if batch is None or not any(_has(output, batch) for output in outputs):
            batch = _shared_dim(outputs, arguments) if batch is None else Size(())
        count = batch.numel()
        owner = torch.cat([_owner(output, batch, count) for output in outputs])
        if not batch:
            return cls(batch, owner, (), ())
        event = next((output.shape[len(batch) :] for output in outputs if _has(output, batch)), Size(()))
        having = [i for i, argument in enumerate(arguments) if _has(argument, batch)]
        unclear = [i for i in having if _fits_one_sample(arguments[i].shape, event)]
        return cls(batch, owner, tuple(i for i in having if i not in unclear), tuple(unclear))

    def per_sample(self, values: Tensor) -> Tensor:
        """The largest of the flat output's ``values`` for each sample, ``(B,)``."""
        known = self.owner >= 0
        result = torch.zeros(max(1, self.count), dtype=values.dtype)
        return result.scatter_reduce(0, self.owner[known], values[known], "amax")


def _has(tensor: Tensor, batch: Size) -> bool:
    return tensor.shape[: len(batch)] == batch


def _shared_dim(outputs: Sequence[Tensor], arguments: Sequence[Tensor]) -> Size:
    firsts = {output.shape[:1] for output in outputs}
    if len(firsts) != 1 or any(output.ndim < 2 for output in outputs):
        return Size(())
    (first,) = firsts
    return (
        first
        if any(argument.ndim >= 2 and argument.shape[:1] == first for argument in arguments)
        else Size(())
    )


def _owner(output: Tensor, batch: Size, count: int) -> Tensor:
    if not _has(output, batch):
        return torch.full((output.numel(),), -1)
    return torch.arange(count).repeat_interleave(output.numel() // max(1, count))


def _fits_one_sample(shape: Size, event: Size) -> bool:
    """Whether an input of this shape could as well be shared, and broadcast against one sample's unknowns."""
    if len(shape) > len(event):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(event), strict=False))
