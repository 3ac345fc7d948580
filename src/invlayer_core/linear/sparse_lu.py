"""A sparse Jacobian and a sparse direct solver, as settings of the adjoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.pattern import SparsityPattern
from invlayer_core.linear.methods import LinearSolver
from invlayer_core.solvers.direct import SparseDirectSolver
from invlayer_core.solvers.registry import get_registry

__all__ = ["SparseLU", "registered_linear_solver"]


@final
@dataclass(frozen=True)
class SparseLU(LinearSolver):
    """A sparse Jacobian from one pullback per colour, factorised sample by sample in float64 on the CPU.

    For systems of thousands of unknowns each of which enters few equations. One factorisation serves every
    cotangent of a call, and derivatives of every order. Each solution is certified: J as F itself pulls back
    must give the right-hand side again; if it does not, it is refined, and if that does not help the sample
    counts as singular.

    Parameters
    ----------
    pattern : SparsityPattern or Tensor, optional
        Where the Jacobian of one system can be non-zero; a sparse tensor or a dense bool one will do. If it
        is left out, it is detected anew in every call, which
        :func:`~invlayer_core.jacobians.detect_sparsity` does once.
    solver : str or SparseDirectSolver
        A registered sparse direct solver (:func:`invlayer_core.linear_solvers` lists them), or an instance.
    options : mapping
        The direct solver's own options, unchanged.
    rtol : float, optional
        Relative residual that is accepted; 7e-11 in float64, 3e-5 in float32. Larger ones are accepted only
        where J is so ill-conditioned that rounding alone explains them.

    Raises
    ------
    SolverNotFoundError
        If no plugin registers ``solver``.
    ConditionsError
        If ``pattern`` is none, or not square.

    Examples
    --------
    >>> import torch
    >>> SparseLU(torch.eye(3, dtype=torch.bool), solver="scipy.splu").pattern
    SparsityPattern(3 x 3, 3 entries)
    """

    needs_blocks = False

    pattern: SparsityPattern | Tensor | None = None
    solver: str | SparseDirectSolver = "scipy.splu"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            pattern = SparsityPattern.of(self.pattern)
            if pattern.shape[0] != pattern.shape[1]:
                raise ConditionsError(
                    f"SparseLU(pattern={pattern}): accepted is a square one; a Jacobian that is not has no "
                    "inverse. linear_solver=LU() with singular='lstsq' takes those."
                )
            object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "options", dict(self.options))
        if not isinstance(self.solver, SparseDirectSolver):
            get_registry().get_linear_spec(self.solver, f"SparseLU(solver={self.solver!r})")

    @property
    def matrix_free(self) -> bool:
        return False

    @property
    def known_pattern(self) -> SparsityPattern | None:
        """The pattern, in its own type."""
        assert self.pattern is None or isinstance(self.pattern, SparsityPattern)
        return self.pattern

    @property
    def direct_solver(self) -> SparseDirectSolver:
        """The instance behind ``solver``; imported on first use."""
        if isinstance(self.solver, SparseDirectSolver):
            return self.solver
        return get_registry().get_linear_solver(self.solver, f"SparseLU(solver={self.solver!r})")

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual that counts as solved."""
        return torch.finfo(dtype).eps ** 0.65 if self.rtol is None else self.rtol


def registered_linear_solver(name: str) -> LinearSolver:
    """The settings behind a registered name, such as ``"scipy.splu"``.

    Raises
    ------
    SolverNotFoundError
        If no plugin registers it.
    """
    return SparseLU(solver=name)
