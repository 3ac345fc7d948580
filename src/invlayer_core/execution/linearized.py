"""What an iterative solver asks for at every point: a function with its Jacobian."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from invlayer_core.conditions.system import System

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

    def _system(self, name: str) -> System:
        if name not in self.systems:
            self.systems[name] = self.workload.system.of_part(name)
        return self.systems[name]
