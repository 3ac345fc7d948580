"""The rule about the registration module: listing solvers imports none of their libraries."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from typing import Final

from invlayer_core.solvers import ENTRY_POINT_GROUP, get_spec, solvers
from invlayer_core.solvers.requirements import parse_requirements
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import NotApplicable, Subject

__all__ = ["registration"]

_PROBE: Final = """
import importlib, json, sys
path, modules = json.loads(sys.argv[1])
sys.path[:] = path
import invlayer_core
before = set(sys.modules)
for module in modules:
    importlib.import_module(module)
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


@rule
def registration(subject: Subject) -> str:
    """Importing the registration module imports none of the libraries that the solver requires."""
    modules = _registration_modules(subject)
    libraries = _import_names(subject)
    heavy = sorted(libraries & _imported_by(modules))
    if heavy:
        raise Violation(
            f"{', '.join(modules)} to be light", f"an import of {', '.join(heavy)}",
            "Keep only SolverSpecs in the registration module, and import the library in the module that "
            "the factory names.",
        )  # fmt: skip
    return f"a new process that imports {', '.join(modules)} has none of {', '.join(sorted(libraries))}"


def _registration_modules(subject: Subject) -> list[str]:
    """The entry points of the distribution that registers the solver."""
    name = subject.spec.name
    plugins = {row.plugin for row in solvers() if row.name == name}
    if not plugins or get_spec(name) != subject.spec:
        raise NotApplicable("the spec is not registered by an installed distribution")
    entries = metadata.entry_points(group=ENTRY_POINT_GROUP)
    modules = sorted({entry.module for entry in entries if entry.dist and entry.dist.name in plugins})
    if not modules:
        raise NotApplicable("the solver is registered by a call, not by an installed distribution")
    return modules


def _import_names(subject: Subject) -> set[str]:
    """What the distributions in ``spec.requires`` are imported as."""
    required = {_normalised(need.name) for need in parse_requirements(subject.spec.requires)}
    if not required:
        raise NotApplicable("SolverSpec.requires is empty: there is no library to keep out")
    provided = metadata.packages_distributions()
    names = {module for module, owners in provided.items() if required & set(map(_normalised, owners))}
    return names | {name.replace("-", "_") for name in required}


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported_by(modules: list[str]) -> set[str]:
    """Top-level modules that a new process imports with these, beyond those of the core."""
    changed = tuple(_last_change(module) for module in modules)
    return _imported_in_new_process(tuple(sys.path), tuple(modules), changed)


def _last_change(module: str) -> float:
    file = getattr(sys.modules.get(module), "__file__", None)
    return os.stat(file).st_mtime if file and os.path.exists(file) else 0.0


@functools.lru_cache
def _imported_in_new_process(
    path: tuple[str, ...], modules: tuple[str, ...], _changed: tuple[float, ...]
) -> set[str]:
    """One process for all solvers of a plugin, until its modules change."""
    ran = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps([path, modules])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise Violation(
            f"{', '.join(modules)} to be importable in a new process",
            ran.stderr.strip().rpartition("\n")[2] or f"exit status {ran.returncode}",
            "Import the module on its own to see the whole error.",
        )
    return set(json.loads(ran.stdout.splitlines()[-1]))
