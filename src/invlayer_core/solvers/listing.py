"""One row per registered solver and per failed plugin: what ``solvers()`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from invlayer_core.solvers.discovery import AnySpec, Plugin, PluginFailure
from invlayer_core.solvers.requirements import unmet_requirement
from invlayer_core.solvers.spec import SolverSpec

__all__ = ["SolverListing", "failed_row", "solver_row"]


@final
@dataclass(frozen=True)
class SolverListing:
    """One row of :func:`~invlayer_core.solvers`: a registered solver, or a plugin that failed to load.

    Attributes
    ----------
    name : str
        The solver's name; for a failed plugin ``"distribution:entry"``.
    kinds : tuple of str
        The problem kinds it solves; ``("linear",)`` for a linear solver; empty for a failed plugin, which
        could not say.
    plugin, version : str
        The distribution that registers it, and its version.
    status : {"ok", "missing dependency", "conflict", "failed"}
        Whether :func:`~invlayer_core.get_solver` can be expected to return it.
    reason : str
        Why the status is not "ok".
    install : str
        The command that brings a missing dependency.
    """

    name: str
    kinds: tuple[str, ...]
    plugin: str
    version: str
    status: Literal["ok", "missing dependency", "conflict", "failed"]
    reason: str = ""
    install: str = ""


def solver_row(spec: AnySpec, plugin: Plugin, rivals: list[Plugin]) -> SolverListing:
    """Describe a claim on a solver's name; ``rivals`` are the other plugins that claim it."""
    kinds = tuple(spec.kinds) if isinstance(spec, SolverSpec) else ("linear",)
    common = (spec.name, kinds, plugin.distribution, plugin.version)
    if rivals:
        reason = f"also claimed by {', '.join(map(str, rivals))}"
        return SolverListing(*common, status="conflict", reason=reason, install=spec.install)
    if unmet := unmet_requirement(spec.requires):
        return SolverListing(*common, status="missing dependency", reason=unmet, install=spec.install)
    return SolverListing(*common, status="ok", install=spec.install)


def failed_row(failure: PluginFailure) -> SolverListing:
    """Describe a plugin that registers nothing because it is broken."""
    plugin = failure.plugin
    return SolverListing(
        plugin.name, (), plugin.distribution, plugin.version, status="failed", reason=failure.reason
    )
