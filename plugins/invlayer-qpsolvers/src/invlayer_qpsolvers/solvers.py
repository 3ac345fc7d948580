"""One adapter around ``qpsolvers.solve_problem``, and a class of it for every solver."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import qpsolvers
from scipy.sparse import coo_matrix, csc_matrix

import invlayer_core as inv

__all__ = ["QPSolver"]


class QPSolver(inv.Solver):
    """One solver behind qpsolvers (Caron et al.); options are those of its ``solve_problem``, unchanged.

    Attributes
    ----------
    backend : str
        The solver's name in qpsolvers.
    """

    backend: ClassVar[str]

    def solve(
        self, problem: inv.QuadraticProblem, y0: np.ndarray, options: Mapping[str, Any]
    ) -> inv.SolverResult:
        program = qpsolvers.Problem(*_matrices(problem, sparse=self._takes_sparse(problem)))
        with _quietly():
            found = qpsolvers.solve_problem(
                program, solver=self.backend, initvals=y0 if y0.any() else None, **options
            )
        message = "" if found.found else f"{self.backend} found no solution{_reason(found)}"
        if found.x is None:
            return inv.SolverResult(y=problem.answer(None), success=False, message=message)
        z_box = _multipliers(found.z_box, problem.size)
        answer = problem.answer(
            found.x,
            equality=_multipliers(found.y, None if problem.b is None else len(problem.b)),
            inequality=_multipliers(found.z, None if problem.h is None else len(problem.h)),
            lower=None if z_box is None else np.maximum(-z_box, 0.0),
            upper=None if z_box is None else np.maximum(z_box, 0.0),
        )
        return inv.SolverResult(
            y=answer, success=bool(found.found), message=message, iterations=_iterations(found)
        )

    def _takes_sparse(self, problem: inv.QuadraticProblem) -> bool:
        """Whether matrices go in as sparse ones; some solvers take both, and have a method for each."""
        if self.backend not in qpsolvers.dense_solvers:
            return True
        given = (problem.P, problem.G, problem.A)
        return self.backend in qpsolvers.sparse_solvers and any(
            isinstance(matrix, inv.CoordinateMatrix) for matrix in given
        )


def _quietly() -> AbstractContextManager[Any]:
    """Keep quiet what the result says, too; a worker thread leaves the filters, which all share, alone."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return warnings.catch_warnings(action="ignore")


def _matrices(problem: inv.QuadraticProblem, *, sparse: bool) -> tuple[Any, ...]:
    P = np.zeros((problem.size, problem.size)) if problem.P is None else problem.P
    return (
        _matrix(P, sparse=sparse),
        problem.q,
        _matrix(problem.G, sparse=sparse),
        problem.h,
        _matrix(problem.A, sparse=sparse),
        problem.b,
        problem.lb,
        problem.ub,
    )


def _matrix(given: Any, *, sparse: bool) -> Any:
    """In the form that the solver takes."""
    if isinstance(given, inv.CoordinateMatrix):
        matrix = coo_matrix((given.values, (given.rows, given.columns)), shape=given.shape).tocsc()
        return matrix if sparse else matrix.toarray()
    return csc_matrix(given) if sparse and given is not None else given


def _multipliers(given: Any, size: int | None) -> Any:
    """What the solver tells, if it tells all of it."""
    if given is None or size is None or np.size(given) != size:
        return None
    return np.asarray(given, dtype=np.float64)


def _reason(found: Any) -> str:
    """The solver's own word, where qpsolvers hands it on."""
    extras = found.extras or {}
    info = extras.get("info")
    for status in (extras.get("status"), extras.get("infostring"), getattr(info, "status", None)):
        if status is not None:
            return f": {status}"
    return ""


def _iterations(found: Any) -> int:
    extras = found.extras or {}
    for value in (extras.get("iter"), getattr(extras.get("info"), "iter", None)):
        if isinstance(value, int):
            return value
    return -1


def __getattr__(name: str) -> type[QPSolver]:
    """The class of a solver, ``Clarabel`` for "clarabel"."""
    backend = name.lower()
    if name != backend.capitalize() or backend not in qpsolvers.available_solvers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class_of(name, backend)


@functools.cache  # one class for each name, so that instances can be pickled
def _class_of(name: str, backend: str) -> type[QPSolver]:
    return type(name, (QPSolver,), {"backend": backend, "__module__": __name__})
