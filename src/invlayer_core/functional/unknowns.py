"""The unknowns of an optimisation problem as one vector per sample, whatever structure the user gave them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, final

from torch import Tensor

from invlayer_core.call import CommonKeywords, SolverLike
from invlayer_core.conditions.structured import StructuredSolver
from invlayer_core.inputs import is_real_tensor
from invlayer_core.solvers.contract import Solver
from invlayer_core.starts import open_guess, previous_solution
from invlayer_core.structured import Structure, pack_equations

__all__ = ["Packed", "Unknowns"]


@final
@dataclass(frozen=True)
class OfStructure:
    """The user's function of a pytree of unknowns, as one of a vector per sample."""

    function: Callable[..., Any]
    structure: Structure

    def __call__(self, y: Tensor, *args: Any) -> Any:
        return self.function(self.structure.unpack(y), *args)


@final
@dataclass(frozen=True)
class Packed:
    """A function that may return a pytree of values, as one that returns one vector per sample."""

    function: Callable[..., Any]

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        value = self.function(y, *args)
        batch = y.shape[:-1]
        if isinstance(value, Tensor) and value.ndim == len(batch) + 1 and not value.is_complex():
            return value
        inner = getattr(self.function, "function", self.function)
        return pack_equations(getattr(inner, "__qualname__", type(inner).__name__), value, batch)


@final
@dataclass(frozen=True)
class Unknowns:
    """y0 as ``(*batch, n)``, and the way back.

    Attributes
    ----------
    vector : Tensor
    structure : Structure or None
        None where y0 is such a vector already.
    """

    vector: Tensor
    structure: Structure | None

    @classmethod
    def of(cls, kind: str, y0: Any, args: Any, keywords: CommonKeywords) -> Unknowns:
        """Take y0, or what it makes of the args, apart by ``event_dims`` of the keywords."""
        y0 = open_guess(y0, args)
        event_dims = keywords.get("event_dims", 1)
        if is_real_tensor(y0) and event_dims == 1:
            return cls(y0, None)
        structure = Structure.of(kind, "y0", y0, event_dims)
        return cls(structure.pack(kind, y0), structure)

    def keywords(self, kind: str, keywords: CommonKeywords) -> CommonKeywords:
        """The keywords of the same call, for unknowns that are a vector."""
        plain = cast(CommonKeywords, {**keywords, "event_dims": 1})
        if self.structure is not None and plain.get("warm_start") is not None:
            y, info = previous_solution(kind, plain["warm_start"])
            plain["warm_start"] = (self.structure.pack(f"{kind}(warm_start=...)", y), info)
        return plain

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The user's function as one of the vector."""
        return function if self.structure is None else OfStructure(function, self.structure)

    def packed(self, function: Callable[..., Any]) -> Callable[..., Tensor]:
        """The same for a function of several values per sample, a tensor or pytree ``(*batch, ...)``."""
        return Packed(self.function(function))

    def solver(self, solver: SolverLike) -> SolverLike:
        """The user's own solver as one of the vector; a registered one as it is."""
        if self.structure is None or isinstance(solver, (str, Solver)):
            return solver
        return StructuredSolver(solver, self.structure)

    def restore(self, y: Tensor) -> Any:
        """The vector as the user gave y0."""
        return y if self.structure is None else self.structure.restore(y)

    def unpack(self, y: Tensor) -> Any:
        """As :meth:`restore`, in the precision of ``y``: for what belongs to y, such as its multipliers."""
        return y if self.structure is None else self.structure.unpack(y)
