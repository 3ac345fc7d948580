"""The hooks by which a distribution tells invlayer about its solvers.

A plugin is a distribution with an entry point in the group ``invlayer.solvers``, whose value is a
*registration module*::

    [project.entry-points."invlayer.solvers"]
    acme = "invlayer_acme"

The module must be light: it is imported to list the solvers, so it must not import the solver library itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from invlayer_core.solvers.linear_spec import LinearSolverSpec
    from invlayer_core.solvers.spec import SolverSpec

__all__ = ["ENTRY_POINT_GROUP", "PROJECT_NAME", "SolverHooks", "hookimpl", "hookspec"]

PROJECT_NAME: Final = "invlayer"
"""The name under which pluggy keeps invlayer's hooks apart from those of other projects."""

ENTRY_POINT_GROUP: Final = "invlayer.solvers"
"""The entry-point group that plugins declare."""

hookspec = HookspecMarker(PROJECT_NAME)
"""Marks a function as the definition of a hook; used in this module only."""

hookimpl = HookimplMarker(PROJECT_NAME)
"""Marks a function of a registration module as the implementation of a hook."""


@final
class SolverHooks:
    """The hooks that a registration module may implement."""

    @hookspec
    def register_solver(self) -> SolverSpec | list[SolverSpec]:
        """Describe the solvers of this distribution, without importing them.

        Called once, with no arguments, when invlayer first needs a solver or a listing.

        Returns
        -------
        SolverSpec or list of SolverSpec
            One frozen description for each solver. The ``factory`` in it is a string, imported on first use.

        Notes
        -----
        A plugin that raises here, returns anything else, or whose specs are for a later
        ``SolverSpec.api`` is left out as a whole and listed as failed with the reason; the other
        plugins are not affected.

        Examples
        --------
        >>> from invlayer_core.solvers import SolverSpec, hookimpl
        >>> @hookimpl
        ... def register_solver():
        ...     return SolverSpec(name="acme.bisect", factory="invlayer_acme.bisect:Bisect", kinds=("root",))
        >>> register_solver().name
        'acme.bisect'
        """
        raise NotImplementedError

    @hookspec
    def register_linear_solver(self) -> LinearSolverSpec | list[LinearSolverSpec]:
        """Describe the sparse direct solvers of this distribution, without importing them.

        They solve with the sparse Jacobian in the derivative: ``SparseLU(solver="acme.lu")``. A module may
        implement this hook, the other, or both; what is said there of failures holds here.

        Returns
        -------
        LinearSolverSpec or list of LinearSolverSpec

        Examples
        --------
        >>> from invlayer_core.solvers import LinearSolverSpec, hookimpl
        >>> @hookimpl
        ... def register_linear_solver():
        ...     return LinearSolverSpec(name="acme.lu", factory="invlayer_acme.lu:AcmeLU")
        >>> register_linear_solver().name
        'acme.lu'
        """
        raise NotImplementedError
