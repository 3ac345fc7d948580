"""Are a solver's requirements installed? Answered from metadata, without importing any of them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Final, final

from torch.torch_version import TorchVersion

__all__ = ["Requirement", "parse_requirements", "unmet_requirement"]


def _differs(found: TorchVersion, wanted: str) -> bool:
    # TorchVersion compares versions under ==, but mere strings under !=.
    return not operator.eq(found, wanted)


_COMPARISONS: Final[Mapping[str, Callable[[TorchVersion, str], bool]]] = MappingProxyType(
    {
        ">=": operator.ge,
        "<=": operator.le,
        "==": operator.eq,
        "!=": _differs,
        ">": operator.gt,
        "<": operator.lt,
    }
)
_REQUIREMENT: Final = re.compile(
    r"\s*(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)\s*(?:\[[^\]]*\])?\s*(?P<clauses>(?:[<>=!].*)?)"
)
_CLAUSE: Final = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*(?:(?:a|b|rc|\.dev|\.post)\d+)*)\s*")


@final
@dataclass(frozen=True)
class Requirement:
    """A distribution, and which versions of it will do.

    Attributes
    ----------
    text : str
        The requirement as the plugin wrote it.
    name : str
        The distribution.
    clauses : tuple of (str, str)
        Comparisons that must all hold, such as ``((">=", "1.11"),)``.
    """

    text: str
    name: str
    clauses: tuple[tuple[str, str], ...]

    def unmet(self) -> str | None:
        """Say in what way it is not met; None if it is."""
        try:
            found = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return f"needs {self.text}, which is not installed"
        return None if self._accepts(found) else f"needs {self.text}, found {self.name} {found}"

    def _accepts(self, found: str) -> bool:
        # The "+cpu" of "2.6.0+cpu" names a build of 2.6.0; requirements are about 2.6.0.
        public = TorchVersion(str(found).partition("+")[0])
        return all(_COMPARISONS[sign](public, wanted) for sign, wanted in self.clauses)


def parse_requirements(requires: Sequence[str]) -> list[Requirement]:
    """Read requirements such as ``"scipy>=1.11,<2"``.

    Parameters
    ----------
    requires : sequence of str
        Each a distribution name, then comparisons (``>= <= == != > <``) separated by commas.

    Raises
    ------
    TypeError
        If it is one string and not a sequence of them.
    ValueError
        If one has another form. Markers, URLs, ``~=`` and wildcards are left out on purpose.

    Examples
    --------
    >>> parse_requirements(["scipy>=1.11, <2"])[0].clauses
    (('>=', '1.11'), ('<', '2'))
    """
    if isinstance(requires, str):
        raise TypeError(f"requires={requires!r} is one string; give a tuple of strings: ({requires!r},).")
    return [_parse(text) for text in requires]


def _parse(text: str) -> Requirement:
    matched = _REQUIREMENT.fullmatch(text)
    parts = matched["clauses"].split(",") if matched and matched["clauses"] else []
    clauses = [_CLAUSE.fullmatch(part) for part in parts]
    if matched is None or not all(clauses):
        raise ValueError(
            f"requirement {text!r} is not understood: write a distribution name, then comparisons "
            f"({' '.join(_COMPARISONS)}) separated by commas, such as 'scipy>=1.11,<2'."
        )
    return Requirement(text, matched["name"], tuple((clause[1], clause[2]) for clause in clauses if clause))


def unmet_requirement(requires: Sequence[str]) -> str | None:
    """Say which requirement is the first that is not met; None if all are.

    Examples
    --------
    >>> unmet_requirement(["torch>=1.0", "no-such-distribution>=2"])
    'needs no-such-distribution>=2, which is not installed'
    """
    return next((unmet for need in parse_requirements(requires) if (unmet := need.unmet())), None)
