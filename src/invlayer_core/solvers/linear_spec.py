"""The frozen metadata by which a sparse direct solver is listed without being imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from invlayer_core.solvers.spec import API_VERSION, check_name_and_factory

__all__ = ["LinearSolverSpec"]


@final
@dataclass(frozen=True)
class LinearSolverSpec:
    """What invlayer knows of a sparse direct solver before importing it.

    Parameters
    ----------
    name : str
        ``"<library>.<method>"`` in lower case, such as ``"scipy.splu"``.
    factory : str
        ``"module:Class"`` of the :class:`~invlayer_core.linear.SparseDirectSolver`; imported on first use.
    requires : tuple of str
        Requirements it needs at run time, such as ``("scipy>=1.11",)``.
    install : str
        The command that brings them, shown when one is missing.
    device : {"cpu"}
        Where the matrix is handed over. On the CPU that is in NumPy; there is no other yet, and a Jacobian on
        another device is copied.
    api : int
        The contract it was written for.

    Raises
    ------
    ValueError
        If the name, the factory or the device is not of the accepted form.

    Examples
    --------
    >>> LinearSolverSpec(name="demo.lu", factory="demo:LU").device
    'cpu'
    """

    name: str
    factory: str
    requires: tuple[str, ...] = ()
    install: str = ""
    device: Literal["cpu"] = "cpu"
    api: int = API_VERSION

    def __post_init__(self) -> None:
        check_name_and_factory("LinearSolverSpec", self.name, self.factory, "'scipy.splu'")
        if self.device != "cpu":
            raise ValueError(
                f"LinearSolverSpec(name={self.name!r}, device={self.device!r}): accepted is 'cpu'; this "
                "invlayer hands over matrices in no other form."
            )
