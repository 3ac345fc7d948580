"""The factors of the saddle-point systems of one call, shared by polish and all cotangents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.quadratic import MATRICES, QuadraticProgram
from invlayer_core.linear.saddle_point.dense import DenseSaddlePoint
from invlayer_core.linear.saddle_point.solution import SaddlePoint
from invlayer_core.matrices import DenseForm
from invlayer_core.solvers.direct import SparseDirectSolver
from invlayer_core.solvers.registry import get_registry

__all__ = ["SaddleBank", "make_saddle_point"]


@final
class SaddleBank:
    """Factors, and the very tensors that they were made of.

    A bank belongs to the graph of one solution and is freed with it.

    Parameters
    ----------
    direct : SparseDirectSolver, optional
        What factorises; by default Cholesky where all matrices are dense, and ``scipy.splu`` where one is
        sparse.
    """

    def __init__(self, direct: SparseDirectSolver | None = None) -> None:
        self.direct = direct
        self.factors: SaddlePoint | None = None
        self.active: Tensor | None = None
        self.exempt: Tensor | None = None
        self._made_of: Mapping[str, Tensor] = {}

    def factorise(self, program: QuadraticProgram, active: Tensor, exempt: Tensor | None) -> SaddlePoint:
        """The factors, anew only if something differs from the last time."""
        matrices = {name: program.tensors[name] for name in MATRICES if name in program.tensors}
        if self.factors is None or not self._fits(matrices, active, exempt):
            self.factors = make_saddle_point(program, active, exempt, self.direct)
            self.active, self.exempt, self._made_of = active, exempt, matrices
        return self.factors

    def _fits(self, matrices: Mapping[str, Tensor], active: Tensor, exempt: Tensor | None) -> bool:
        known = [self._made_of.get(name) for name in matrices]
        same = all(_is_same(old, new) for old, new in zip(known, matrices.values(), strict=True))
        return same and _is_same(self.active, active) and _is_same(self.exempt, exempt)


def _is_same(old: Tensor | None, new: Tensor | None) -> bool:
    return old is new if old is None or new is None else _functorch.is_same_memory(old, new)


def make_saddle_point(
    program: QuadraticProgram,
    active: Tensor,
    exempt: Tensor | None = None,
    direct: SparseDirectSolver | None = None,
) -> SaddlePoint:
    """Factorise, in the way that the form of the matrices asks for."""
    if direct is None and all(isinstance(form, DenseForm) for form in program.layout.forms.values()):
        return DenseSaddlePoint(program, active, exempt)
    if direct is None:
        direct = get_registry().get_linear_solver("scipy.splu", "qp with sparse matrices")
    from invlayer_core.linear.saddle_point.sparse import SparseSaddlePoint  # it needs NumPy

    return SparseSaddlePoint(program, active, exempt, direct)
