"""Every error and warning that invlayer raises, in one tree.

::

    InvlayerError
    ├── SolverNotFoundError        no solver of that name is registered
    ├── SolverLoadError            the solver is registered, but cannot be imported
    ├── SolverConflictError        two distributions claim one solver name
    ├── ConvergenceError           the measured residual of a sample is too large
    ├── SingularJacobianError      the derivative does not exist at the solution
    ├── ConditionsError            the conditions, or what they were given, cannot be used
    └── UnsupportedTransformError  a torch transform would give a wrong derivative

    UserWarning
    ├── ConvergenceWarning         the same as ConvergenceError, under ``on_failure="warn"``
    ├── DegeneracyWarning          the solution has only one-sided derivatives
    └── PerformanceWarning         right, but slower than it need be
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from invlayer_core.certificate import SolveInfo

__all__ = [
    "ConditionsError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DegeneracyWarning",
    "InvlayerError",
    "PerformanceWarning",
    "SingularJacobianError",
    "SolverConflictError",
    "SolverLoadError",
    "SolverNotFoundError",
    "UnsupportedTransformError",
    "warn_user",
]


class InvlayerError(Exception):
    """Base class of every error that invlayer raises on purpose."""


class SolverNotFoundError(InvlayerError, LookupError):
    """No solver of the given name is registered."""


class SolverLoadError(InvlayerError, ImportError):
    """A registered solver cannot be imported: a dependency is missing, or its module is broken."""


class SolverConflictError(InvlayerError):
    """Two distributions, or two calls of ``register_solver``, claim the same solver name."""


class ConvergenceError(InvlayerError):
    """At least one sample misses its tolerance, by invlayer's own measurement.

    Attributes
    ----------
    info : SolveInfo
        Per-sample status, residual, iterations and message of the whole batch.
    """

    def __init__(self, message: str, info: SolveInfo | None = None) -> None:
        super().__init__(message)
        self.info = info


class SingularJacobianError(InvlayerError):
    """The Jacobian of the conditions is singular at the solution: it defines no derivative."""


class ConditionsError(InvlayerError, ValueError):
    """The conditions, or the tensors they were given, cannot be used as they are."""


class UnsupportedTransformError(InvlayerError):
    """The requested torch transform has no exact rule here; it raises instead of being wrong."""


class ConvergenceWarning(UserWarning):
    """At least one sample misses its tolerance, and ``on_failure="warn"`` asked to go on."""


class DegeneracyWarning(UserWarning):
    """The solution has only one-sided derivatives; the message says where, and which one is given."""


class PerformanceWarning(UserWarning):
    """The result is right, but a slower way had to be taken; the message says why."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code, however deep inside invlayer (or torch) this is called."""
    torch_folder = os.path.join(os.path.dirname(sys.modules["torch"].__file__ or ""), "")
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame, torch_folder):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inside(frame: FrameType, torch_folder: str) -> bool:
    """Whether the code is the core's, a plugin's or torch's."""
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith("invlayer_") or frame.f_code.co_filename.startswith(torch_folder)
