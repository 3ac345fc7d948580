"""From entry points to solver specs, one plugin at a time, so that a broken one harms no other.

pluggy's own ``load_setuptools_entrypoints`` is not used: it stops at the first plugin that fails, and of
two plugins with one entry-point name it keeps whichever comes first on ``sys.path``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Final, TypeVar, final

from pluggy import PluginManager, PluginValidationError

from invlayer_core.errors import SolverLoadError
from invlayer_core.solvers.hookspecs import ENTRY_POINT_GROUP, SolverHooks
from invlayer_core.solvers.linear_spec import LinearSolverSpec
from invlayer_core.solvers.requirements import parse_requirements
from invlayer_core.solvers.spec import API_VERSION, SolverSpec

__all__ = ["AnySpec", "Plugin", "PluginFailure", "check_specs", "installed_plugins", "load_specs"]

AnySpec = SolverSpec | LinearSolverSpec
SpecType = TypeVar("SpecType", bound=AnySpec)

_SPEC_OF_HOOK: Final[Mapping[str, type[AnySpec]]] = MappingProxyType(
    {"register_solver": SolverSpec, "register_linear_solver": LinearSolverSpec}
)


@final
@dataclass(frozen=True)
class Plugin:
    """Who registers a solver: an entry point of a distribution, or a call of ``register_solver``.

    Attributes
    ----------
    distribution, entry, version : str
        The last two are empty for a call.
    """

    distribution: str
    entry: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        """The name under which pluggy knows it, ``"distribution:entry"``."""
        return f"{self.distribution}:{self.entry}"

    def __str__(self) -> str:
        return f"{self.distribution!r} {self.version}".rstrip()


@final
@dataclass(frozen=True)
class PluginFailure:
    """A plugin that could not be loaded, the reason in words, and the exception."""

    plugin: Plugin
    reason: str
    exception: BaseException


def installed_plugins() -> list[tuple[Plugin, EntryPoint]]:
    """List the installed plugins in an order that ``sys.path`` cannot change, importing none.

    The environment variable ``INVLAYER_PLUGIN_AUTOLOAD=0`` leaves out all plugins,
    ``INVLAYER_DISABLE_PLUGINS=a,b`` those of the distributions a and b.
    """
    if os.environ.get("INVLAYER_PLUGIN_AUTOLOAD", "").strip() == "0":
        return []
    disabled = {_normalised(name) for name in os.environ.get("INVLAYER_DISABLE_PLUGINS", "").split(",")}
    # Keyed by the whole declaration: one distribution that is on sys.path twice is one plugin.
    found = {
        (_normalised(plugin.distribution), plugin.entry, entry_point.value): (plugin, entry_point)
        for plugin, entry_point in _declared_plugins()
    }
    return [found[key] for key in sorted(found) if key[0] not in disabled]


def _declared_plugins() -> Iterator[tuple[Plugin, EntryPoint]]:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        distribution = entry_point.dist
        # A half-deleted installation leaves metadata with neither a name nor a version.
        name = (distribution and distribution.name) or "unknown"
        version = (distribution and distribution.version) or ""
        yield Plugin(name, entry_point.name, version), entry_point


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def load_specs(manager: PluginManager, plugin: Plugin, entry_point: EntryPoint) -> tuple[AnySpec, ...]:
    """Import one registration module, register it with pluggy, call its hooks and check what they return.

    Raises
    ------
    SolverLoadError, TypeError, ValueError
        If anything is wrong with the plugin; it does not stay registered.
    """
    module = _import_registration_module(entry_point)
    _check_hooks(manager, module, entry_point.value)
    try:
        manager.register(module, plugin.name)
        hooks = [hook for hook in _SPEC_OF_HOOK if hook in _implemented_hooks(manager, module)]
        specs = [check_specs(_call_hook(manager, module, hook), _SPEC_OF_HOOK[hook]) for hook in hooks]
        return tuple(spec for of_hook in specs for spec in of_hook)
    except BaseException as exc:
        if manager.is_registered(module):
            manager.unregister(module)
        if isinstance(exc, PluginValidationError):
            raise SolverLoadError(
                f"its {_hook_in(exc)} does not fit the hook of this invlayer: {exc}"
            ) from exc
        raise


def _import_registration_module(entry_point: EntryPoint) -> object:
    try:
        return entry_point.load()
    except (Exception, SystemExit) as exc:  # a module that calls sys.exit() must not end the program
        raise SolverLoadError(f"importing {entry_point.value!r} raised {_quoted(exc)}") from exc


def _check_hooks(manager: PluginManager, module: object, value: str) -> None:
    # pluggy itself accepts a misspelt hook in silence, and a module without hooks too.
    known = [name for name in dir(SolverHooks) if not name.startswith("_")]
    implemented = _implemented_hooks(manager, module)
    for name, optional in implemented.items():
        if name not in known and not optional:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the hooks are {known}."
            raise SolverLoadError(f"{value!r} implements the unknown hook {name!r}; {hint}")
    if not implemented.keys() & set(known):
        raise SolverLoadError(
            f"{value!r} implements no hook: mark its function register_solver with @invlayer_core.hookimpl."
        )
    if (other := manager.get_name(module)) is not None:
        raise SolverLoadError(f"{value!r} is already registered as {other!r}: two plugins share one module.")


def _implemented_hooks(manager: PluginManager, module: object) -> dict[str, bool]:
    """Name the marked functions, with True for those that pluggy's ``optionalhook`` lets be unknown."""
    marked = {name: manager.parse_hookimpl_opts(module, name) for name in dir(module)}
    return {
        options.get("specname") or name: bool(options.get("optionalhook"))
        for name, options in marked.items()
        if options is not None
    }


def _hook_in(error: PluginValidationError) -> str:
    """The hook that pluggy complains of."""
    return "register_linear_solver" if "register_linear_solver" in str(error) else "register_solver"


def _call_hook(manager: PluginManager, module: object, name: str) -> object:
    others = [plugin for plugin in manager.get_plugins() if plugin is not module]
    hook = manager.subset_hook_caller(name, remove_plugins=others)
    try:
        returned = hook()
    except (Exception, SystemExit) as exc:
        raise SolverLoadError(f"its hook {name}() raised {_quoted(exc)}") from exc
    return returned[0] if returned else None  # pluggy drops a None


def _quoted(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"


def check_specs(returned: object, kind: type[SpecType]) -> tuple[SpecType, ...]:
    """Take what a registering hook or call gave, if it can be used.

    Raises
    ------
    TypeError
        If it is not a spec of the ``kind`` or a list of them.
    ValueError
        If a spec is for a later contract, has a malformed requirement, or comes twice.
    """
    specs = tuple(returned) if isinstance(returned, (list, tuple)) else (returned,)
    called = next(hook for hook, spec_type in _SPEC_OF_HOOK.items() if spec_type is kind)
    for spec in specs:
        if not isinstance(spec, kind):
            raise TypeError(
                f"{called} gave {spec!r}; accepted are a {kind.__name__} or a list of {kind.__name__}."
            )
        if spec.api > API_VERSION:
            raise ValueError(
                f"solver {spec.name!r} is built for api {spec.api}, this invlayer speaks {API_VERSION}: "
                "upgrade invlayer-core, or install an earlier version of the plugin."
            )
        parse_requirements(spec.requires)
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{called} gave {twice} more than once; a solver's name must be unique.")
    return specs
