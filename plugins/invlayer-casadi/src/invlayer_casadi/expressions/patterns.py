"""Nonzeros on one pattern as those on another: derivative Functions leave out what is unread, or zero."""

from __future__ import annotations

from collections.abc import Sequence

import casadi as ca
import torch
from torch import Tensor

__all__ = ["fitted", "projected", "sources_of"]


def fitted(sizes: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a derivative Function takes: it asks for nothing of the outputs that it does not read."""
    return [t if t.shape[-1] == size else t[..., :size] for t, size in zip(tensors, sizes, strict=True)]


def sources_of(given: ca.Sparsity, wanted: ca.Sparsity) -> Tensor | None:
    """Which nonzero of one pattern each one of a larger is, or one past the last; None if all agree."""
    if given.nnz() == wanted.nnz():
        return None
    of = {place: k for k, place in enumerate(zip(*given.get_triplet(), strict=True))}
    return torch.tensor([of.get(place, given.nnz()) for place in zip(*wanted.get_triplet(), strict=True)])


def projected(nonzeros: Tensor, sources: Tensor | None) -> Tensor:
    """Nonzeros on one pattern as nonzeros on a larger one."""
    if sources is None:
        return nonzeros
    padded = torch.cat([nonzeros, nonzeros.new_zeros(*nonzeros.shape[:-1], 1)], dim=-1)
    return padded.index_select(-1, sources.to(nonzeros.device))
