"""Solves with the saddle-point matrix of the active constraints, sample by sample, by a sparse direct solver.

It is imported on first use: what it works with is NumPy, which a direct solver has been given anyway.
"""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram, program_of_sample
from invlayer_core.linear.saddle_point.entries import Entries, stacked, symmetric_part
from invlayer_core.linear.saddle_point.solution import SaddleSolution
from invlayer_core.linear.saddle_point.sparse_factors import SparseFactors
from invlayer_core.linear.saddle_point.sparse_system import SparseSystem
from invlayer_core.matrices import MatrixForm, SparseForm
from invlayer_core.solvers.direct import SparseDirectSolver

__all__ = ["SparseSaddlePoint", "entries_of"]


@final
class SparseSaddlePoint:
    """The factors for one batch of programs and active constraints.

    Parameters
    ----------
    program, active, exempt : see :class:`~invlayer_core.linear.saddle_point.dense.DenseSaddlePoint`
    direct : SparseDirectSolver
    """

    def __init__(
        self, program: QuadraticProgram, active: Tensor, exempt: Tensor | None, direct: SparseDirectSolver
    ) -> None:
        batch = active.shape[:-1]
        self.device = active.device
        host = active.reshape(batch.numel(), active.shape[-1]).cpu().numpy()
        skipped = [False] * len(host) if exempt is None else exempt.reshape(-1).tolist()
        self.samples = [
            None if skip else SparseFactors(_system(program_of_sample(program, batch, i), host[i]), direct)
            for i, skip in enumerate(skipped)
        ]

    def solve(self, rhs: Tensor) -> SaddleSolution:
        """w for right-hand sides ``(V, B, n + m)``."""
        host = rhs.to("cpu", torch.float64).numpy()
        w = np.zeros_like(host)
        singular, unsolvable = (torch.zeros(rhs.shape[1], dtype=torch.bool) for _ in range(2))
        for index, sample in enumerate(self.samples):
            if sample is not None:
                unsolvable[index] = _solve_all(sample, host[:, index], w[:, index])
                singular[index] = not sample.regular
        verdicts = (mask.to(self.device) for mask in (singular, torch.zeros_like(singular), unsolvable))
        return SaddleSolution(torch.from_numpy(w).to(rhs), *verdicts)


def _solve_all(sample: SparseFactors, rhs: np.ndarray, w: np.ndarray) -> bool:
    """Solve for all right-hand sides with the same factors; whether one has no solution."""
    while True:
        regular, unsolvable = sample.regular, False
        for index, row in enumerate(rhs):
            w[index], its = sample.solve(row)
            unsolvable |= its
        if sample.regular is regular:
            return unsolvable


def _system(program: QuadraticProgram, active: np.ndarray) -> SparseSystem:
    layout, n = program.layout, program.layout.size
    names = ("lb" in layout.names, "ub" in layout.names)
    held = {name: entries_of(form, program.tensors[name]) for name, form in layout.forms.items()}
    rows = stacked([held[name] for name in ("A", "G") if name in held], n)
    P = symmetric_part(held["P"]) if "P" in held else stacked([], n)
    return SparseSystem(Entries((n, n), P.row, P.column, P.value), rows, active, layout.equalities, *names)


def entries_of(form: MatrixForm, held: Tensor) -> Entries:
    """One sample's matrix by its entries, row by row."""
    held = held.detach().to("cpu", torch.float64)
    shape = (form.rows, form.columns)
    if isinstance(form, SparseForm):
        return Entries(shape, form.row.cpu().numpy(), form.column.cpu().numpy(), held.numpy()).by_rows()
    array = held.numpy()
    row, column = array.nonzero()
    return Entries(shape, row, column, array[row, column])
