"""Solvers by name: which are registered, by whom, and an instance on demand.

Three levels, each paid for only when needed: entry-point metadata, then the light registration modules
(both by the first :func:`get_registry`), then the adapter of the one solver that is asked for.
"""

from __future__ import annotations

import threading
from typing import final

from pluggy import PluginManager

from invlayer_core.solvers.claims import Claim, Claims
from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.direct import SparseDirectSolver
from invlayer_core.solvers.discovery import (
    PluginFailure,
    check_specs,
    installed_plugins,
    load_specs,
)
from invlayer_core.solvers.hookspecs import PROJECT_NAME, SolverHooks
from invlayer_core.solvers.linear_spec import LinearSolverSpec
from invlayer_core.solvers.listing import SolverListing, failed_row, solver_row
from invlayer_core.solvers.loading import load_linear_solver, load_solver
from invlayer_core.solvers.spec import KINDS, SolverSpec

__all__ = ["Registry", "get_registry"]


@final
class Registry:
    """The solvers that plugins and calls have registered; empty until :meth:`load_plugins`.

    All methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._manager = PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(SolverHooks)
        self._claims: Claims[SolverSpec] = Claims("solver", "register_solver", "scipy.fsolve")
        self._linear_claims: Claims[LinearSolverSpec] = Claims(
            "linear solver", "register_linear_solver", "scipy.splu"
        )
        self._failures: list[PluginFailure] = []
        self._instances: dict[str, Solver] = {}
        self._linear_instances: dict[str, SparseDirectSolver] = {}
        self._lock = threading.RLock()

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """The plugins that could not be loaded."""
        return tuple(self._failures)

    def load_plugins(self) -> None:
        """Load every installed plugin, once; a broken one is kept in :attr:`failures`."""
        with self._lock:
            for plugin, entry_point in installed_plugins():
                try:
                    specs = load_specs(self._manager, plugin, entry_point)
                except Exception as exc:
                    reason = " ".join(str(exc).split())  # one line, whatever the plugin wrote
                    self._failures.append(PluginFailure(plugin, reason, exc.__cause__ or exc))
                else:
                    for spec in specs:
                        if isinstance(spec, SolverSpec):
                            self._claims.add(spec, plugin)
                        else:
                            self._linear_claims.add(spec, plugin)

    def register_solver(self, spec: SolverSpec, *, replace: bool = False) -> None:
        """See :func:`invlayer_core.register_solver`."""
        check_specs([spec], SolverSpec)
        with self._lock:
            self._claims.take(spec, replace=replace)
            self._instances.pop(spec.name, None)

    def register_linear_solver(self, spec: LinearSolverSpec, *, replace: bool = False) -> None:
        """See :func:`invlayer_core.register_linear_solver`."""
        check_specs([spec], LinearSolverSpec)
        with self._lock:
            self._linear_claims.take(spec, replace=replace)
            self._linear_instances.pop(spec.name, None)

    def get_spec(self, name: str, called: str | None = None) -> SolverSpec:
        """See :func:`invlayer_core.get_spec`; ``called`` is what the user called, for messages."""
        return self._claim(name, called or f"get_spec({name!r})").spec

    def get_solver(self, name: str) -> Solver:
        """See :func:`invlayer_core.get_solver`."""
        claim = self._claim(name, f"get_solver({name!r})")
        if (known := self._instances.get(name)) is not None:
            return known
        # Outside the lock: an adapter may take seconds to import.
        solver = load_solver(claim.spec, claim.plugin)
        with self._lock:
            # In a notebook the class behind "__main__:Class" changes when its cell is run again.
            if self._claims.is_sole(claim) and not claim.spec.factory.startswith("__main__:"):
                return self._instances.setdefault(name, solver)
        return solver

    def get_linear_spec(self, name: str, called: str) -> LinearSolverSpec:
        """What is known of a sparse direct solver; ``called`` is what the user called, for messages."""
        with self._lock:
            return self._linear_claims.sole(name, called, self._failures).spec

    def get_linear_solver(self, name: str, called: str) -> SparseDirectSolver:
        """The sparse direct solver of that name, imported on first use."""
        with self._lock:
            claim = self._linear_claims.sole(name, called, self._failures)
        if (known := self._linear_instances.get(name)) is not None:
            return known
        solver = load_linear_solver(claim.spec, claim.plugin)
        with self._lock:
            if self._linear_claims.is_sole(claim) and not claim.spec.factory.startswith("__main__:"):
                return self._linear_instances.setdefault(name, solver)
        return solver

    def solvers(self, kind: str | None = None) -> tuple[SolverListing, ...]:
        """See :func:`invlayer_core.solvers`."""
        if kind is not None and kind not in KINDS:
            raise ValueError(f"solvers(kind={kind!r}): accepted are {sorted(KINDS)}, or None for all.")
        with self._lock:
            contested = self._claims.contested()
            failed = [failed_row(failure) for failure in self._failures]
        rows = [
            solver_row(claim.spec, claim.plugin, rivals)
            for claim, rivals in contested
            if kind is None or kind in claim.spec.kinds
        ]
        return _sorted(rows + failed)

    def linear_solvers(self) -> tuple[SolverListing, ...]:
        """See :func:`invlayer_core.linear_solvers`."""
        with self._lock:
            contested = self._linear_claims.contested()
        return _sorted([solver_row(claim.spec, claim.plugin, rivals) for claim, rivals in contested])

    def _claim(self, name: str, called: str) -> Claim[SolverSpec]:
        with self._lock:
            return self._claims.sole(name, called, self._failures)


def _sorted(rows: list[SolverListing]) -> tuple[SolverListing, ...]:
    return tuple(sorted(rows, key=lambda row: (row.name, row.plugin)))


_process_lock = threading.RLock()
_process_registry: Registry | None = None


def get_registry() -> Registry:
    """Return this process's registry; the first call creates it and loads the plugins."""
    global _process_registry
    with _process_lock:
        if _process_registry is None:
            # Set before loading: a plugin that calls register_solver() while it is imported ends up here.
            _process_registry = Registry()
            try:
                _process_registry.load_plugins()
            except BaseException:  # Ctrl-C: the next call starts afresh instead of finding half of it
                _process_registry = None
                raise
        return _process_registry
