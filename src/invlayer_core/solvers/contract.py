"""What a solver is given, and what it gives back.

A plugin author writes one class with one method::

    class Bisection(Solver):
        def solve(self, problem, y0, options):
            ...
            return SolverResult(y=y, success=True, iterations=k)

The same method serves two kinds of solver, told apart by ``SolverSpec.batched``:

* ``batched=False`` (SciPy, CasADi, a C++ binary): called once per sample. ``problem`` is a
  :class:`SampleProblem`, ``y0`` a float64 NumPy vector of shape ``(n,)`` that the solver may overwrite.
* ``batched=True`` (torch-native): called once per batch. ``problem`` is a :class:`BatchProblem`,
  ``y0`` a tensor of shape ``(B, n)`` on the device and in the dtype of the caller's tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor

from invlayer_core.solvers.problem import BatchProblem, Problem, SampleProblem

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BatchProblem", "Problem", "SampleProblem", "Solver", "SolverResult", "Status"]


@final
class Status(IntEnum):
    """What became of one sample, as measured by invlayer and not as claimed by the solver."""

    CONVERGED = 0
    """The measured residual is within the tolerance."""
    NOT_CONVERGED = 1
    """The solver said that it failed, and the measured residual confirms it."""
    FALSE_CONVERGENCE = 2
    """The solver reported success, but the measured residual is above the tolerance."""
    NOT_FINITE = 3
    """The returned solution, or the residual there, holds NaN or infinity."""
    SOLVER_ERROR = 4
    """The solver raised an exception for this sample."""
    WRONG_SHAPE = 5
    """The solver returned something that is not a real vector of the right length."""
    UNVERIFIED = 6
    """Nothing to measure: only a Jacobian of the conditions was given, not the conditions."""
    TIMED_OUT = 7
    """The solve of this sample took longer than ``timeout=``, and was stopped."""
    NO_SOLUTION = 8
    """The solver proved that there is none (infeasible or unbounded), and the measured residual agrees."""

    @property
    def ok(self) -> bool:
        """Whether the sample's value and gradient may be used."""
        return self in (Status.CONVERGED, Status.UNVERIFIED)


@final
@dataclass(frozen=True)
class SolverResult:
    """What a solver returns: its answer, and what it claims about it.

    For a per-sample solver every field is a scalar (``y`` is ``(n,)``); for a batched solver the
    fields may be tensors of shape ``(B,)`` (``y`` is ``(B, n)``).

    Attributes
    ----------
    y : ndarray or Tensor
        The solution, ``(n,)`` or ``(B, n)``.
    success : bool or Tensor
        The solver's own verdict. invlayer records it, and measures for itself.
    iterations : int or Tensor
        Iterations, or evaluations of F where the solver counts only those; -1 if unknown.
    no_solution : bool
        Whether the solver proved that this sample has no solution; per-sample solvers only.
    message : str or sequence of str
        The solver's own words, shown to the user when the sample fails; a batched solver may have one for
        each sample.
    aux : mapping
        Anything else worth keeping, by name; it carries no gradient.
    """

    y: np.ndarray | Tensor
    success: bool | Tensor = True
    iterations: int | Tensor = -1
    message: str | Sequence[str] = ""
    aux: Mapping[str, Any] = field(default_factory=dict)
    no_solution: bool = False


class Solver(ABC):
    """An adapter around one solver; immutable, so that one instance may serve many calls.

    Attributes
    ----------
    batched : bool
        Whether ``solve`` takes a whole batch; must agree with ``SolverSpec.batched``.
    """

    batched: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What messages and ``info.solver`` call an instance that comes without a registered name."""
        return type(self).__name__

    def takes_jacobian(self, options: Mapping[str, Any]) -> bool:
        """Whether ``solve`` with these options asks for J, besides F: it then gains more from lockstep."""
        return False

    def takes_turns(self, options: Mapping[str, Any]) -> bool:
        """Whether one solve may wait inside F while another runs, as in lockstep.

        Not so where the library holds a lock while it calls F: the others would wait for it for ever.
        """
        return True

    def renews_jacobian(self, options: Mapping[str, Any]) -> bool:
        """Whether a ``solve`` that takes J asks for it again on its way, and not only at its start."""
        return True

    def is_stackable(self, options: Mapping[str, Any]) -> bool:
        """Whether a batch may be given to a per-sample ``solve`` as one system of B·n unknowns.

        That is right where the method never forms J (its cost is then that of B systems), stops at the
        largest component of the residual, and does not mind which unknowns belong together.
        """
        return False

    @abstractmethod
    def solve(self, problem: Any, y0: Any, options: Mapping[str, Any]) -> SolverResult:
        """Find y with F(y) = 0, starting from ``y0``.

        Parameters
        ----------
        problem : SampleProblem or BatchProblem
            As ``SolverSpec.batched`` says; see the module's docstring.
        y0 : ndarray of shape (n,), or Tensor of shape (B, n)
            The initial guess; a private copy.
        options : mapping
            The user's ``options=`` unchanged. Unknown names must raise ``TypeError``.

        Returns
        -------
        SolverResult
            A failure is a result with ``success=False`` and a message. An exception is fine too:
            it is caught, kept with its sample, and never reaches the other samples.
        """
