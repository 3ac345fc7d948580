"""CasADi for invlayer: functions, root finders, NLP solvers and integrators as torch layers.

This is the registration module. It does not import CasADi: that waits until one of its names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invlayer_core import SolverSpec, hookimpl

if TYPE_CHECKING:
    from invlayer_casadi.function import CasadiFunction
    from invlayer_casadi.layer import CasadiLayer

__all__ = ["CasadiFunction", "CasadiLayer", "register_solver"]

_PUBLIC = {"CasadiFunction": "invlayer_casadi.function", "CasadiLayer": "invlayer_casadi.layer"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    rootfinder = _spec("casadi.rootfinder", "rootfinding.registered:Rootfinder", ("root", "fixed_point"))
    programs = [
        _spec(f"casadi.{name}", f"nlp.registered:{adapter}", ("nlp", "minimize"))
        for adapter in ("Ipopt", "Sqpmethod")
        for name in (adapter.lower(), f"nlpsol.{adapter.lower()}")  # short, and as CasADi files them
    ]
    return [rootfinder, *programs]


def _spec(name: str, adapter: str, kinds: tuple[str, ...]) -> SolverSpec:
    constrained = "nlp" in kinds
    return SolverSpec(
        name=name,
        factory=f"invlayer_casadi.{adapter}",
        kinds=kinds,
        requires=("casadi>=3.6.6",),
        install="pip install invlayer-casadi",
        thread_safe=True,  # every solve makes a Function of its own
        bounds=constrained,
        constraints=constrained,
    )
