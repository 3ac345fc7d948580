"""Nonzeros on one pattern as those on another: derivative Functions leave out what is unread, or zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import casadi as ca
import torch
from torch import Tensor

__all__ = ["fitted", "projected"]


def fitted(rule: ca.Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a derivative Function takes: it asks for nothing of the outputs that it does not read."""
    sizes = [rule.nnz_in(i) for i in range(rule.n_in())]
    return [t if t.shape[-1] == size else t[..., :size] for t, size in zip(tensors, sizes, strict=True)]


def projected(nonzeros: Tensor, given: Any, wanted: Any) -> Tensor:
    """Nonzeros on one pattern as nonzeros on a larger one."""
    if given.nnz() == wanted.nnz():
        return nonzeros
    of = {place: k for k, place in enumerate(zip(*given.get_triplet(), strict=True))}
    sources = [of.get(place, given.nnz()) for place in zip(*wanted.get_triplet(), strict=True)]
    padded = torch.cat([nonzeros, nonzeros.new_zeros(*nonzeros.shape[:-1], 1)], dim=-1)
    return padded.index_select(-1, torch.tensor(sources, device=nonzeros.device))
