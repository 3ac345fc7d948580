"""Greedy colouring: which rows (or columns) of a sparse Jacobian can share one pullback (or pushforward).

Two equations that depend on a common unknown must not share a pullback, where their entries would add up:
they are neighbours of distance two in the bipartite graph of equations and unknowns (Gebremedhin, Manne &
Pothen, What Color Is Your Jacobian?, 2005). Each takes the lowest colour that no such neighbour has.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

__all__ = ["Colouring", "colour_groups"]


@final
class Colouring(NamedTuple):
    """The colour of every vertex, ``(size,)``, and how many colours there are."""

    colours: Tensor
    number: int


def colour_groups(vertices: Tensor, nets: Tensor, size: int) -> Colouring:
    """Colour vertices so that no two of one net share a colour.

    The colours already seen in a net are the bits of one Python integer, so that neither the graph of
    conflicts nor a table of nets by colours is formed: time and memory are of the order of the entries.

    Parameters
    ----------
    vertices, nets : Tensor of int64, shape ``(nnz,)``
        The incidences: vertex ``vertices[k]`` lies in net ``nets[k]``.
    size : int
        Number of vertices; one in no net gets colour 0.

    Examples
    --------
    >>> import torch
    >>> colour_groups(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3).colours
    tensor([0, 1, 0])
    """
    order = torch.argsort(vertices, stable=True)
    members = nets[order].tolist()
    ends = torch.bincount(vertices, minlength=size).cumsum(0).tolist()
    seen = [0] * (max(members, default=-1) + 1)
    colours, begin = [0] * size, 0
    for vertex, end in enumerate(ends):
        own = members[begin:end]
        taken = 0
        for net in own:
            taken |= seen[net]
        lowest = ~taken & (taken + 1)  # a single bit: the lowest one that is not set
        for net in own:
            seen[net] |= lowest
        colours[vertex], begin = lowest.bit_length() - 1, end
    return Colouring(torch.tensor(colours, dtype=torch.int64), max(colours, default=-1) + 1)
