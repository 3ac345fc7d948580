"""The public functions: find, list and register solvers in this process's registry."""

from __future__ import annotations

from invlayer_core.solvers.contract import Solver
from invlayer_core.solvers.linear_spec import LinearSolverSpec
from invlayer_core.solvers.listing import SolverListing
from invlayer_core.solvers.registry import get_registry
from invlayer_core.solvers.spec import SolverSpec

__all__ = ["get_solver", "get_spec", "linear_solvers", "register_linear_solver", "register_solver", "solvers"]


def get_solver(name: str) -> Solver:
    """Return the solver of that name, importing its adapter on first use.

    Parameters
    ----------
    name : str
        A registered name, such as ``"scipy.fsolve"``; :func:`solvers` lists them.

    Returns
    -------
    Solver
        Immutable, so one instance serves all calls.

    Raises
    ------
    SolverNotFoundError
        If no plugin registers the name. The message lists the names there are, those that are near, and
        the plugins that failed to load.
    SolverConflictError
        If more than one distribution registers the name.
    SolverLoadError
        If a requirement is missing or too old, or the adapter cannot be imported.

    Examples
    --------
    >>> type(get_solver("torch.newton"))
    <class 'invlayer_core.native.newton.Newton'>
    """
    return get_registry().get_solver(name)


def get_spec(name: str) -> SolverSpec:
    """Return what is known of a solver without importing it.

    Parameters
    ----------
    name : str
        A registered name.

    Raises
    ------
    SolverNotFoundError, SolverConflictError
        As in :func:`get_solver`.

    Examples
    --------
    >>> get_spec("torch.newton").batched
    True
    """
    return get_registry().get_spec(name)


def solvers(kind: str | None = None) -> tuple[SolverListing, ...]:
    """List the registered solvers, and the plugins that failed to load; no solver library is imported.

    Parameters
    ----------
    kind : str, optional
        Only solvers for this problem kind, such as ``"root"``. A failed plugin is always listed, as it
        could not say what it solves.

    Returns
    -------
    tuple of SolverListing
        Sorted by name. A name that several distributions claim has one row for each.

    Raises
    ------
    ValueError
        If there is no such problem kind.

    Examples
    --------
    >>> [row.status for row in solvers("root") if row.name == "torch.newton"]
    ['ok']
    """
    return get_registry().solvers(kind)


def register_solver(spec: SolverSpec, *, replace: bool = False) -> None:
    """Register a solver in this process, as a plugin would by its hook.

    Parameters
    ----------
    spec : SolverSpec
        Its ``factory`` may name a class of a notebook or script: ``"__main__:MySolver"``.
    replace : bool
        True takes the name from whoever has it, and from all who contest it.

    Raises
    ------
    SolverConflictError
        If the name is taken and ``replace`` is False.
    TypeError, ValueError
        If ``spec`` is not a :class:`SolverSpec`, is for a later contract, or has a malformed requirement.

    Examples
    --------
    >>> from invlayer_core.solvers import SolverSpec
    >>> spec = SolverSpec(name="demo.bisect", factory="__main__:Bisect", kinds=("root",))
    >>> register_solver(spec, replace=True)
    >>> get_spec("demo.bisect") is spec
    True
    """
    get_registry().register_solver(spec, replace=replace)


def linear_solvers() -> tuple[SolverListing, ...]:
    """List the registered sparse direct solvers, which ``SparseLU(solver=)`` takes by name.

    Returns
    -------
    tuple of SolverListing
        Sorted by name, each of the kind ``"linear"``. Plugins that failed to load are in :func:`solvers`.

    Examples
    --------
    >>> [row.name for row in linear_solvers() if row.name == "scipy.splu"]
    ['scipy.splu']
    """
    return get_registry().linear_solvers()


def register_linear_solver(spec: LinearSolverSpec, *, replace: bool = False) -> None:
    """Register a sparse direct solver in this process, as a plugin would by its hook.

    Parameters
    ----------
    spec : LinearSolverSpec
    replace : bool
        True takes the name from whoever has it.

    Raises
    ------
    SolverConflictError
        If the name is taken and ``replace`` is False.
    TypeError, ValueError
        If ``spec`` is not a :class:`LinearSolverSpec`, is for a later contract, or has a malformed
        requirement.

    Examples
    --------
    >>> from invlayer_core.solvers import LinearSolverSpec
    >>> register_linear_solver(LinearSolverSpec(name="demo.lu", factory="demo:LU"), replace=True)
    >>> "demo.lu" in [row.name for row in linear_solvers()]
    True
    """
    get_registry().register_linear_solver(spec, replace=replace)
