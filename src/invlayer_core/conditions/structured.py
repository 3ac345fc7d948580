"""Conditions and solver functions of a pytree of unknowns, as functions of one vector per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.inputs import NumpyFunction
from invlayer_core.structured import Structure, pack_equations

__all__ = ["StructuredConditions", "StructuredJacobian", "StructuredSolver"]


@final
@dataclass(frozen=True)
class StructuredConditions:
    """``F(y, *args)`` for y of any structure, as ``(*batch, n) -> (*batch, m)``."""

    conditions: Callable[..., Any]
    structure: Structure
    square: bool = False  # whether the solver needs as many equations as unknowns

    @property
    def function(self) -> Any:
        """The user's own function, for messages."""
        return getattr(self.conditions, "function", self.conditions)

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        called = f"conditions {_name(self.function)!r}"
        residual = pack_equations(called, self.conditions(self.structure.unpack(y), *args), y.shape[:-1])
        if self.square and residual.shape[-1] != self.structure.size:
            raise ConditionsError(
                f"{called} returned {residual.shape[-1]} equations per system for {self.structure.size} "
                f"unknowns ({self.structure.describe()}; a complex one counts twice); accepted are as many "
                "equations as unknowns."
            )
        return residual


@final
@dataclass(frozen=True)
class StructuredJacobian:
    """The user's ``∂F/∂y (y, *args)`` for y of any structure: n × n in the order of its leaves."""

    jacobian: Callable[..., Tensor]
    structure: Structure

    def __post_init__(self) -> None:
        if self.structure.is_complex:
            raise ConditionsError(
                f"jacobian= came with complex unknowns ({self.structure.describe()}), where ∂F/∂y alone says "
                "nothing of ∂F/∂ȳ. Accepted are real unknowns; or leave jacobian out, and autograd takes it."
            )

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        return self.jacobian(self.structure.unpack(y), *args)


@final
@dataclass(frozen=True)
class StructuredSolver:
    """A plain callable ``solver(y0, *args)`` for y of any structure."""

    solver: Callable[..., Any]
    structure: Structure

    @property
    def function(self) -> Any:
        """The user's own function, for messages."""
        return getattr(self.solver, "function", self.solver)

    def __call__(self, y0: Tensor, *args: Any) -> Tensor:
        y = self.solver(self.structure.unpack(y0), *args)
        if isinstance(self.solver, NumpyFunction):
            y = self.solver.as_tensors(y)
        return self.structure.pack(_name(self.function), y)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
