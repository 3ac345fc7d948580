"""From a spec to a solver: check what it requires, import its factory, make the instance."""

from __future__ import annotations

import inspect
from importlib import import_module
from operator import attrgetter
from typing import TypeVar

from invlayer_core.errors import SolverLoadError
from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.direct import SparseDirectSolver
from invlayer_core.solvers.discovery import AnySpec, Plugin
from invlayer_core.solvers.linear_spec import LinearSolverSpec
from invlayer_core.solvers.requirements import unmet_requirement
from invlayer_core.solvers.spec import SolverSpec

__all__ = ["load_linear_solver", "load_solver"]

SolverType = TypeVar("SolverType", Solver, SparseDirectSolver)


def load_solver(spec: SolverSpec, plugin: Plugin) -> Solver:
    """Import the class that a spec names, and make an instance of it.

    Parameters
    ----------
    spec : SolverSpec
        ``spec.factory`` is ``"module:Class"``; the module may be ``__main__``.
    plugin : Plugin
        Who registered it; named in every error.

    Raises
    ------
    SolverLoadError
        If a requirement is not met, the module cannot be imported, or the class is not a concrete
        :class:`~invlayer_core.Solver`, as batched as its spec, that can be made without arguments.
    """
    factory = _usable_factory(spec, plugin, Solver)  # type: ignore[type-abstract]
    if factory.batched is not spec.batched:
        reason = f"has batched={factory.batched}, its spec batched={spec.batched}; they must agree"
        raise SolverLoadError(_message(spec, plugin, f"its class {spec.factory!r} {reason}"))
    return _instance(factory, spec, plugin)


def load_linear_solver(spec: LinearSolverSpec, plugin: Plugin) -> SparseDirectSolver:
    """Import the class that a linear solver's spec names, and make an instance of it.

    Raises
    ------
    SolverLoadError
        As in :func:`load_solver`, for a concrete :class:`~invlayer_core.linear.SparseDirectSolver`.
    """
    factory = _usable_factory(spec, plugin, SparseDirectSolver)  # type: ignore[type-abstract]
    return _instance(factory, spec, plugin)


def _usable_factory(spec: AnySpec, plugin: Plugin, base: type[SolverType]) -> type[SolverType]:
    if unmet := unmet_requirement(spec.requires):
        raise SolverLoadError(_message(spec, plugin, unmet))
    factory = _import_factory(spec, plugin)
    if not (isinstance(factory, type) and issubclass(factory, base)):
        reason = f"its factory {spec.factory!r} is {factory!r}, not a subclass of {base.__name__}"
        raise SolverLoadError(_message(spec, plugin, reason))
    if inspect.isabstract(factory):
        missing = ", ".join(sorted(factory.__abstractmethods__))
        raise SolverLoadError(_message(spec, plugin, f"its class {spec.factory!r} does not define {missing}"))
    return factory


def _import_factory(spec: AnySpec, plugin: Plugin) -> object:
    module_name, _, attribute = spec.factory.partition(":")
    try:
        module = import_module(module_name)
    except Exception as exc:  # a broken shared library raises OSError, a broken module anything
        missing = getattr(exc, "name", None) if isinstance(exc, ModuleNotFoundError) else None
        reason = _raised(f"importing {module_name!r}", exc) + (f" (missing: {missing})" if missing else "")
        raise SolverLoadError(_message(spec, plugin, reason)) from exc
    try:
        return attrgetter(attribute)(module)
    except AttributeError as exc:
        reason = f"its factory {spec.factory!r} does not exist: {module_name!r} has no {attribute!r}"
        raise SolverLoadError(_message(spec, plugin, reason)) from exc


def _instance(factory: type[SolverType], spec: AnySpec, plugin: Plugin) -> SolverType:
    try:
        return factory()
    except Exception as exc:
        reason = _raised(f"{spec.factory!r}()", exc) + "; a factory is called without arguments"
        raise SolverLoadError(_message(spec, plugin, reason)) from exc


def _raised(what: str, exc: Exception) -> str:
    return f"{what} raised {type(exc).__name__}: {exc}"


def _message(spec: AnySpec, plugin: Plugin, reason: str) -> str:
    getter = "get_solver" if isinstance(spec, SolverSpec) else "get_linear_solver"
    requires = f" It requires {', '.join(spec.requires)}." if spec.requires else ""
    install = f" To install what it needs: {spec.install}" if spec.install else ""
    return f"{getter}({spec.name!r}), registered by {plugin}: {reason}.{requires}{install}"
