"""Names and who claims them: one table for the solvers, one for the linear solvers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Generic, TypeVar, final

from invlayer_core.errors import SolverConflictError, SolverNotFoundError
from invlayer_core.solvers.discovery import AnySpec, Plugin, PluginFailure

__all__ = ["CALL", "Claim", "Claims"]

CALL: Final = Plugin("register_solver() call")

SpecType = TypeVar("SpecType", bound=AnySpec)


@final
@dataclass(frozen=True)
class Claim(Generic[SpecType]):
    """One plugin's wish to have its solver under the name ``spec.name``."""

    spec: SpecType
    plugin: Plugin


@final
class Claims(Generic[SpecType]):
    """The claims on every name; its owner holds the lock.

    Parameters
    ----------
    noun : str
        What is registered, for messages: ``"solver"`` or ``"linear solver"``.
    register : str
        The function that registers one by a call.
    example : str
        A name.
    """

    def __init__(self, noun: str, register: str, example: str) -> None:
        self._noun, self._register, self._example = noun, register, example
        self._table: dict[str, list[Claim[SpecType]]] = {}

    def add(self, spec: SpecType, plugin: Plugin) -> None:
        """Note what a plugin claims, whoever else does."""
        self._table.setdefault(spec.name, []).append(Claim(spec, plugin))

    def take(self, spec: SpecType, *, replace: bool) -> None:
        """Register by a call, which takes a name only if it is free or with ``replace``."""
        claims = self._table.get(spec.name, [])
        if claims and not replace:
            raise SolverConflictError(
                f"{self._register}({spec.name!r}): the name is already claimed by "
                f"{_listed(claims)}. Choose another name, or pass replace=True."
            )
        self._table[spec.name] = [Claim(spec, CALL)]

    def sole(self, name: str, called: str, failures: Sequence[PluginFailure]) -> Claim[SpecType]:
        """The one claim on a name.

        Raises
        ------
        SolverNotFoundError, SolverConflictError
            If there is none, or more than one.
        """
        if not isinstance(name, str):
            raise TypeError(f"{called}: a {self._noun}'s name is a string, such as {self._example!r}.")
        claims = self._table.get(name, [])
        if not claims:
            raise SolverNotFoundError(self._not_found(called, name, failures))
        if len(claims) > 1:
            installed = [claim.plugin.distribution for claim in claims if claim.plugin is not CALL]
            disable = " or ".join(f"INVLAYER_DISABLE_PLUGINS={distribution}" for distribution in installed)
            raise SolverConflictError(
                f"{called}: the name is claimed by {_listed(claims)}. Keep one of them: set "
                f"{disable} in the environment, or uninstall the other."
            )
        return claims[0]

    def is_sole(self, claim: Claim[SpecType]) -> bool:
        """Whether ``claim`` is still the one on its name."""
        return self._table.get(claim.spec.name) == [claim]

    def contested(self) -> list[tuple[Claim[SpecType], list[Plugin]]]:
        """Every claim, with the other plugins that claim the same name."""
        return [
            (claim, [other.plugin for other in claims if other is not claim])
            for claims in self._table.values()
            for claim in claims
        ]

    def _not_found(self, call: str, name: str, failures: Sequence[PluginFailure]) -> str:
        names = sorted(self._table)
        sentences = [f"{call}: no {self._noun} of that name is registered."]
        of_any_library = [full for full in names if full.rpartition(".")[2] == name.rpartition(".")[2]]
        if near := of_any_library or get_close_matches(name, names):
            sentences.append(f"Did you mean {' or '.join(map(repr, near))}?")
        sentences.append(f"Registered are: {', '.join(names) or 'none'}.")
        sentences += [f"Plugin {f.plugin.name!r} failed to load: {f.reason}" for f in failures]
        sentences.append(
            f"Install the plugin that brings it{_install_line(name)}, or call {self._register}(); "
            "INVLAYER_DISABLE_PLUGINS and INVLAYER_PLUGIN_AUTOLOAD=0 hide installed plugins."
        )
        return "\n".join(sentences)


def _install_line(name: str) -> str:
    """The command for the plugins of this project, whose names tell it."""
    library = name.partition(".")[0]
    return f" (pip install invlayer-{library})" if library == "scipy" else ""


def _listed(claims: Sequence[Claim[SpecType]]) -> str:
    return " and ".join(str(claim.plugin) for claim in claims)
