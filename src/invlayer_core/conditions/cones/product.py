"""A product of cones: which entries of a vector belong to which."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.cones.exponential import ExponentialFamily
from invlayer_core.conditions.cones.family import ConeFamily
from invlayer_core.conditions.cones.orthant import NonnegativeFamily, ZeroFamily
from invlayer_core.conditions.cones.power import PowerFamily
from invlayer_core.conditions.cones.second_order import SecondOrderFamily
from invlayer_core.conditions.cones.semidefinite import SemidefiniteFamily
from invlayer_core.errors import ConditionsError

__all__ = ["ConeGroup", "Cones"]


@final
class ConeGroup(NamedTuple):
    """Cones of one kind and size, and where their entries are: ``(count, k)``."""

    family: ConeFamily
    entries: Tensor
    start: int | None  # of the first entry, if they are contiguous, as most are


@final
@dataclass(frozen=True)
class Cones:
    """The cone K = {0}ᶻ × R₊ˡ × SOC × … × PSD × … × EXP × … × POW × …, in this order.

    Parameters
    ----------
    zero, nonneg : int
        How many entries are zero, and how many are non-negative.
    soc : tuple of int
        The sizes of the second-order cones {(t, u) : ‖u‖ ≤ t}, t first.
    psd : tuple of int
        The sides n of the cones of positive semidefinite n × n matrices, as vectors of n (n + 1) / 2: the
        upper triangle column by column, off-diagonal entries times √2.
    exp : int
        How many exponential cones, the closure of {(x, y, z) : y exp(x / y) ≤ z, y > 0}.
    power : tuple of float
        The exponents a of the power cones {(x, y, z) : xᵃ y¹⁻ᵃ ≥ abs(z), x, y ≥ 0}.

    Attributes
    ----------
    groups : tuple of ConeGroup
        The cones by kind and size, in the order of their first entries.
    order : Tensor
        Where each entry is once the groups have been joined.
    is_sorted : bool
        Whether joined groups are in order as they are.

    Raises
    ------
    ConditionsError
        If a size is negative, or an exponent is not between 0 and 1.

    Examples
    --------
    >>> cones = Cones(zero=1, nonneg=2, soc=(3,))
    >>> cones.size
    6
    >>> cones.project_dual(torch.tensor([-1.0, -1.0, 2.0, 0.0, 3.0, 4.0]))
    tensor([-1.0000,  0.0000,  2.0000,  2.5000,  1.5000,  2.0000])
    """

    zero: int = 0
    nonneg: int = 0
    soc: tuple[int, ...] = ()
    psd: tuple[int, ...] = ()
    exp: int = 0
    power: tuple[float, ...] = ()
    groups: tuple[ConeGroup, ...] = field(init=False, repr=False, compare=False)
    order: Tensor = field(init=False, repr=False, compare=False)
    is_sorted: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("soc", "psd", "power"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = (self.zero, self.nonneg, self.exp, *self.soc, *self.psd)
        if any(count < 0 for count in counts) or 0 in self.soc or 0 in self.psd:
            raise ConditionsError(f"{self}: accepted are numbers of entries >= 0, and sizes >= 1.")
        if not all(0.0 < alpha < 1.0 for alpha in self.power):
            raise ConditionsError(f"{self}: accepted are exponents between 0 and 1 for the power cones.")
        # Now, and not on first use: that may be under torch.func, which would wrap the index tensors.
        groups = self._grouped()
        order = torch.argsort(torch.cat([torch.arange(0), *(g.entries.reshape(-1) for g in groups)]))
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "is_sorted", bool((order[1:] > order[:-1]).all()))

    @property
    def size(self) -> int:
        """m, the number of entries of a vector."""
        triangles = sum(side * (side + 1) // 2 for side in self.psd)
        return self.zero + self.nonneg + sum(self.soc) + triangles + 3 * (self.exp + len(self.power))

    @property
    def is_polyhedral(self) -> bool:
        """Whether K is made of equations and inequalities alone."""
        return not (self.soc or self.psd or self.exp or self.power)

    def _grouped(self) -> tuple[ConeGroup, ...]:
        start, found = 0, dict[ConeFamily, list[range]]()
        families: list[tuple[ConeFamily, int]] = [(_ZERO, self.zero), (_NONNEGATIVE, self.nonneg)]
        families += [(SecondOrderFamily(size), 1) for size in self.soc]
        families += [(SemidefiniteFamily(side), 1) for side in self.psd]
        families += [(_EXPONENTIAL, self.exp)]
        if self.power:
            families += [(PowerFamily(self.power), len(self.power))]
        for family, count in families:
            for _ in range(count):
                found.setdefault(family, []).append(range(start, start + family.size))
                start += family.size
        return tuple(
            ConeGroup(family, torch.tensor(ranges), ranges[0].start if _are_contiguous(ranges) else None)
            for family, ranges in found.items()
        )

    def taken(self, group: ConeGroup, v: Tensor) -> Tensor:
        """The entries of a group, ``(*batch, m)`` to ``(*batch, count, k)``."""
        if group.start is not None:
            piece = v[..., group.start : group.start + group.entries.numel()]
            return piece.reshape(*v.shape[:-1], *group.entries.shape)
        return v[..., group.entries.to(v.device)]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The groups' ``(*batch, count, k)`` as ``(*batch, m)``."""
        flat = torch.cat([part.flatten(-2) for part in parts], -1)
        if self.is_sorted:
            return flat
        return flat[..., self.order.to(flat.device)]

    def project_dual(self, v: Tensor) -> Tensor:
        """The projection onto the dual cone K*, ``(*batch, m)``, differentiable to every order.

        By Moreau's decomposition v = Π_K*(v) − Π_K(−v), which gives the projection onto K too.
        """
        if not self.size:
            return v
        return self.joined([group.family.project_dual(self.taken(group, v)) for group in self.groups])


_ZERO, _NONNEGATIVE, _EXPONENTIAL = ZeroFamily(), NonnegativeFamily(), ExponentialFamily()


def _are_contiguous(ranges: list[range]) -> bool:
    return all(one.stop == other.start for one, other in pairwise(ranges))
