"""Whether a program may go the short way of ``single/``, and how the general one goes on where that ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.quadratic import QuadraticLayout
from invlayer_core.solvers.contract import Solver, SolverResult

__all__ = ["Once", "is_plain", "solve_plainly"]


@final
class Once(Solver):
    """A solver that is called at most once; what came of it serves the short way and the general one."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.outcome: SolverResult | Exception | None = None

    def solve(self, problem: Any, y0: Any, options: Mapping[str, Any]) -> SolverResult:
        if self.outcome is None:
            try:
                self.outcome = self.solver.solve(problem, y0, options)
            except Exception as error:
                self.outcome = error
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def is_plain(layout: QuadraticLayout, theta: tuple[Tensor, ...]) -> bool:
    """Whether there is one program on the CPU, and no transform runs."""
    if _functorch.is_active() or _functorch.in_forward_mode():
        return False
    return all(
        tensor.ndim == layout.event_dims(name) and tensor.device.type == "cpu"
        for name, tensor in zip(layout.names, theta, strict=True)
    )


def solve_plainly(
    layout: QuadraticLayout,
    theta: tuple[Tensor, ...],
    solver: Solver,
    options: Mapping[str, Any],
    multipliers: bool,
) -> tuple[Tensor, ...] | None:
    """The short way; None if the program needs the general one."""
    from invlayer_core.quadratic.single.attach import solve_single  # it needs NumPy, which the core may lack

    return solve_single(layout, theta, solver, options, multipliers=multipliers)
