"""What an iterative solver asks for at every point: a function with its Jacobian, or with products of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.solvers.problem import Products, products_of

if TYPE_CHECKING:
    from invlayer_core.execution.workload import Workload

__all__ = ["Linearized"]


@final
class Linearized:
    """F or a part, by name, with its Jacobian: from one evaluation, with as little around it as can be."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.shape = workload, workload.system.shape
        self.systems = {"residual": workload.system}

    def __call__(self, name: str, y: Tensor) -> tuple[Tensor, Tensor]:
        workload, point = self.workload, y.reshape(self.shape.full)
        system, given = self._system(name), f"{name}_jacobian"
        if given in workload.system.parts:  # the user's own
            with workload.recording():
                value = system.residual(point, workload.theta)
                blocks = self._system(given).residual(point, workload.theta)
        else:
            value, blocks = workload.derivatives.linearized(system, point, workload.theta, workload.recorded)
        if name == "residual":
            return workload.checked(value, y), blocks
        system.check_residual(value)
        value, blocks = value.reshape(y.shape[0], -1), blocks.reshape(y.shape[0], -1, y.shape[1])
        if value.dtype != y.dtype or blocks.dtype != y.dtype:
            return value.to(y.dtype), blocks.to(y.dtype)
        return value, blocks

    def products(self, name: str, y: Tensor) -> Products:
        """The same, with the products of its Jacobian; the user's own serves them, too."""
        workload = self.workload
        if workload.recorded:
            raise ConditionsError(
                f"{workload.name} takes its steps by products with J, and the adjoint is to record them: the "
                "inner iterations are not recorded. Accepted are adjoint=Implicit(), for a large system with "
                "linear_solver=inv.linear.CG(); or options={'matrix_free': False}, which forms JᵀJ."
            )
        if f"{name}_jacobian" in workload.system.parts:
            return products_of(*self(name, y))
        system, count = self._system(name), y.shape[0]
        value, push, pull = workload.derivatives.products(system, y.reshape(self.shape.full), workload.theta)
        system.check_residual(value)
        return Products(
            value.reshape(count, -1).to(y.dtype), lambda v: push(v).reshape(count, -1).to(y.dtype), pull
        )

    def _system(self, name: str) -> System:
        if name not in self.systems:
            self.systems[name] = self.workload.system.of_part(name)
        return self.systems[name]
