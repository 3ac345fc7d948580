"""∂F/∂z of the conditions from CasADi's exact second derivatives, entry by entry.

Rows as in ``conditions.py``, unknowns (x, λ, ν) with the multipliers in units u, θ the weights of the rows:

    [ H     u ∂gᵀ            u I             ]
    [ Θ ∂g  −(1 − Θ) s u     0               ]
    [ Θ     0                −(1 − Θ) s u    ]
"""

from __future__ import annotations

import copy
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi.nlp.conditions import NlpConditions
from invlayer_casadi.nlp.program import NlpProgram

__all__ = ["NlpJacobian"]


@final
class NlpJacobian(inv.jacobians.SparseJacobian):
    """The entries, ``(*batch, nnz)``, or dense blocks of them; differentiable.

    Attributes
    ----------
    conditions : NlpConditions
    pattern : SparsityPattern
    """

    def __init__(self, conditions: NlpConditions) -> None:
        self.conditions = conditions
        rows, columns = _places(conditions.program)
        self._order = torch.from_numpy(np.lexsort((rows, columns)))
        size = 2 * conditions.program.unknowns + conditions.program.constraints
        self.pattern = inv.jacobians.SparsityPattern.of(
            (torch.from_numpy(rows), torch.from_numpy(columns)), (size, size)
        )
        self.places = self.pattern.rows, self.pattern.cols
        self._rows_of_g = torch.from_numpy(conditions.program.jacobian_places[0])

    def of(self, conditions: NlpConditions) -> NlpJacobian:
        """That of other conditions of the same program."""
        twin = copy.copy(self)
        twin.conditions = conditions
        return twin

    def __copy__(self) -> NlpJacobian:
        twin = NlpJacobian.__new__(NlpJacobian)
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return NlpJacobian, (self.conditions,)

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        entries, size = self.entries(y, *args), self.pattern.shape[0]
        places = (self.pattern.rows * size + self.pattern.cols).to(entries.device)
        blocks = entries.new_zeros(*entries.shape[:-1], size * size).index_add(-1, places, entries)
        return blocks.reshape(*entries.shape[:-1], size, size)

    def entries(self, y: Tensor, *args: Any) -> Tensor:
        p, *bounds, unit = args
        conditions, m = self.conditions, self.conditions.program.constraints
        x, lam_g, lam_x = conditions.split(y, unit)
        hessian, jacobian, gradient, g = conditions.program.second(x, p, lam_g)
        with torch.no_grad():
            rows = conditions.rows((x, lam_g, lam_x), p, gradient, g, bounds)
            weights = inv.constraints.two_sided_weights(*rows, conditions.activity)
            corner = (weights - 1.0) * rows.scale * unit
        of_g = weights.index_select(-1, self._rows_of_g.to(x.device))
        parts = [
            *(hessian, jacobian * unit, unit.expand_as(x), of_g * jacobian),
            *(corner[..., :m], weights[..., m:], corner[..., m:]),
        ]
        return torch.cat(parts, -1).index_select(-1, self._order.to(x.device))


def _places(program: NlpProgram) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of H, ∂gᵀ, I, Θ ∂g, the corner of λ, Θ, and the corner of ν."""
    n, m = program.unknowns, program.constraints
    h_rows, h_columns = program.hessian_places
    j_rows, j_columns = program.jacobian_places
    of_x, of_g, of_v = np.arange(n), n + np.arange(m), n + m + np.arange(n)
    rows = [h_rows, j_columns, of_x, n + j_rows, of_g, of_v, of_v]
    columns = [h_columns, n + j_rows, of_v, j_columns, of_g, of_x, of_v]
    return np.concatenate(rows), np.concatenate(columns)
