"""Solvers by name: which are registered, by whom, and an instance on demand.

Three levels, each paid for only when needed: entry-point metadata, then the light registration modules
(both by the first :func:`get_registry`), then the adapter of the one solver that is asked for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, final

from pluggy import PluginManager

from invlayer_core.errors import SolverConflictError, SolverNotFoundError
from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.discovery import (
    Plugin,
    PluginFailure,
    check_specs,
    installed_plugins,
    load_specs,
)
from invlayer_core.solvers.hookspecs import PROJECT_NAME, SolverHooks
from invlayer_core.solvers.listing import SolverListing, failed_row, solver_row
from invlayer_core.solvers.loading import load_solver
from invlayer_core.solvers.spec import KINDS, SolverSpec

__all__ = ["Registry", "get_registry"]

_CALL: Final = Plugin("register_solver() call")


@final
@dataclass(frozen=True)
class _Claim:
    """One plugin's wish to have its solver under the name ``spec.name``."""

    spec: SolverSpec
    plugin: Plugin


@final
class Registry:
    """The solvers that plugins and calls have registered; empty until :meth:`load_plugins`.

    All methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._manager = PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(SolverHooks)
        self._claims: dict[str, list[_Claim]] = {}
        self._failures: list[PluginFailure] = []
        self._instances: dict[str, Solver] = {}
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
                        self._claims.setdefault(spec.name, []).append(_Claim(spec, plugin))

    def register_solver(self, spec: SolverSpec, *, replace: bool = False) -> None:
        """See :func:`invlayer_core.register_solver`."""
        check_specs([spec])
        with self._lock:
            claims = self._claims.get(spec.name, [])
            if claims and not replace:
                raise SolverConflictError(
                    f"register_solver({spec.name!r}): the name is already claimed by "
                    f"{_listed(claims)}. Choose another name, or pass replace=True."
                )
            self._claims[spec.name] = [_Claim(spec, _CALL)]
            self._instances.pop(spec.name, None)

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
            if self._claims[name] == [claim] and not claim.spec.factory.startswith("__main__:"):
                return self._instances.setdefault(name, solver)
        return solver

    def solvers(self, kind: str | None = None) -> tuple[SolverListing, ...]:
        """See :func:`invlayer_core.solvers`."""
        if kind is not None and kind not in KINDS:
            raise ValueError(f"solvers(kind={kind!r}): accepted are {sorted(KINDS)}, or None for all.")
        with self._lock:
            contested = [(claim, claims) for claims in self._claims.values() for claim in claims]
            failed = [failed_row(failure) for failure in self._failures]
        rows = [
            solver_row(claim.spec, claim.plugin, [other.plugin for other in claims if other is not claim])
            for claim, claims in contested
            if kind is None or kind in claim.spec.kinds
        ]
        return tuple(sorted(rows + failed, key=lambda row: (row.name, row.plugin)))

    def _claim(self, name: str, called: str) -> _Claim:
        if not isinstance(name, str):
            raise TypeError(f"{called}: a solver's name is a string, such as 'scipy.fsolve'.")
        with self._lock:
            claims = list(self._claims.get(name, ()))
        if not claims:
            raise SolverNotFoundError(self._not_found(called, name))
        if len(claims) > 1:
            installed = [claim.plugin.distribution for claim in claims if claim.plugin is not _CALL]
            disable = " or ".join(f"INVLAYER_DISABLE_PLUGINS={distribution}" for distribution in installed)
            raise SolverConflictError(
                f"{called}: the name is claimed by {_listed(claims)}. Keep one of them: set "
                f"{disable} in the environment, or uninstall the other."
            )
        return claims[0]

    def _not_found(self, call: str, name: str) -> str:
        with self._lock:
            names, failures = sorted(self._claims), self.failures
        near = get_close_matches(name, names)
        sentences = [f"{call}: no solver of that name is registered."]
        if near:
            sentences.append(f"Did you mean {' or '.join(map(repr, near))}?")
        sentences.append(f"Registered are: {', '.join(names) or 'none'}.")
        sentences += [f"Plugin {f.plugin.name!r} failed to load: {f.reason}" for f in failures]
        sentences.append(
            "Install the plugin that brings it, or call register_solver(); "
            "INVLAYER_DISABLE_PLUGINS and INVLAYER_PLUGIN_AUTOLOAD=0 hide installed plugins."
        )
        return "\n".join(sentences)


def _listed(claims: list[_Claim]) -> str:
    return " and ".join(str(claim.plugin) for claim in claims)


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
