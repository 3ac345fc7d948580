"""The frozen metadata by which a solver is listed without being imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["API_VERSION", "KINDS", "SolverSpec", "check_name_and_factory"]

API_VERSION = 1
"""The version of the contract between invlayer and its plugins (``SolverSpec.api``)."""

KINDS = frozenset({"root", "fixed_point", "minimize", "least_squares", "nlp", "cone", "qp"})
"""The problem kinds a solver may declare."""


def check_name_and_factory(called: str, name: str, factory: str, example: str) -> None:
    """Refuse a name or a factory that is not of the accepted form (``ValueError``)."""
    library, _, method = name.partition(".")
    if name != name.lower() or not library or not method:
        raise ValueError(
            f"{called}(name={name!r}): a solver's name is '<library>.<method>' in lower case, "
            f"such as {example}."
        )
    module, _, attribute = factory.partition(":")
    if not module or not attribute:
        raise ValueError(
            f"{called}(name={name!r}, factory={factory!r}): the factory is "
            "'package.module:Class', the class to import on first use."
        )


@final
@dataclass(frozen=True)
class SolverSpec:
    """What invlayer knows of a solver before importing it.

    Parameters
    ----------
    name : str
        ``"<library>.<method>"`` in lower case, such as ``"scipy.fsolve"``.
    factory : str
        ``"module:Class"`` of the :class:`~invlayer_core.Solver`; imported on first use.
    kinds : tuple of str
        The problem kinds it solves: ``"root"``, ``"fixed_point"``, ``"minimize"``, ``"least_squares"``,
        ``"nlp"``, ``"cone"``, ``"qp"``.
    requires : tuple of str
        Requirements it needs at run time, such as ``("scipy>=1.11",)``.
    install : str
        The command that brings them, shown when one is missing.
    batched : bool
        True if ``solve`` takes a whole batch of torch tensors, False if one NumPy sample.
    thread_safe : bool
        True if two threads may call ``solve`` of one instance at once.
    bounds, constraints : bool
        Whether it accepts bounds, and constraints.
    scalar : bool
        Whether it solves one equation in one unknown only.
    bracket : bool
        Whether it needs ``options={"bracket": (lo, hi)}``, between which F changes its sign.
    api : int
        The contract it was written for.

    Raises
    ------
    ValueError
        If the name, the factory or a kind is not of the accepted form.

    Examples
    --------
    >>> SolverSpec(name="demo.bisect", factory="demo:Bisect", kinds=("root",)).batched
    False
    """

    name: str
    factory: str
    kinds: tuple[str, ...]
    requires: tuple[str, ...] = ()
    install: str = ""
    batched: bool = False
    thread_safe: bool = True
    bounds: bool = False
    constraints: bool = False
    scalar: bool = False
    bracket: bool = False
    api: int = API_VERSION

    def __post_init__(self) -> None:
        check_name_and_factory("SolverSpec", self.name, self.factory, "'scipy.fsolve'")
        unknown = sorted(set(self.kinds) - KINDS)
        if unknown or not self.kinds:
            raise ValueError(
                f"SolverSpec(name={self.name!r}, kinds={self.kinds!r}): accepted are one or more of "
                f"{sorted(KINDS)}; give a tuple of those."
            )
