"""From the canonical x and y back to the user's variables and dual variables: sparse linear maps.

Both are found by sending known vectors through CVXPY's own way back, so that layouts and signs are CVXPY's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import cvxpy as cp
import numpy as np
from cvxpy import settings as s
from cvxpy.reductions.cvx_attr2constr import CvxAttr2Constr, recover_value_for_leaf
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.reductions.solution import Solution
from cvxpy.reductions.solvers import utilities
from scipy.sparse import csr_array
from torch import Tensor

import invlayer_core as inv
from invlayer_cvxpy.affine import SparseAffine
from invlayer_cvxpy.canonical import CanonicalForm

__all__ = ["Output", "outputs"]


@final
@dataclass(frozen=True)
class Output:
    """One thing that the layer returns.

    Attributes
    ----------
    source : {"x", "y"}
        Primal or dual.
    map : SparseAffine
        From x or y to the flattened value.
    shape : tuple of int
    exponential : bool
        Whether the value is the exponential of that: variables of geometric programs.
    """

    source: Literal["x", "y"]
    map: SparseAffine
    shape: tuple[int, ...]
    exponential: bool = False

    def __call__(self, solution: inv.ConeSolution) -> Tensor:
        flat = self.map(getattr(solution, self.source))
        value = flat.reshape((*flat.shape[:-1], *self.shape))
        return value.exp() if self.exponential else value


def outputs(form: CanonicalForm, problem: cp.Problem, wanted: Sequence[Any]) -> list[Output]:
    """The maps for the wanted variables, dual variables and constraints, in order.

    Raises
    ------
    ConditionsError
        If one of them is not part of the problem.
    """
    variables = {variable.id for variable in problem.variables()}
    duals = {dual.id: (c, k) for c in problem.constraints for k, dual in enumerate(c.dual_variables)}
    found = []
    for each in wanted:
        if isinstance(each, cp.constraints.constraint.Constraint) and each.dual_variables:
            each = each.dual_variables[0]
        if getattr(each, "id", None) in duals:
            found.append(_dual(form, *duals[each.id]))
        elif isinstance(each, cp.Variable) and each.id in variables:
            found.append(_primal(form, each))
        else:
            raise inv.ConditionsError(
                f"CvxpyLayer(variables=...): {each} is not part of the problem; accepted are its variables "
                f"{', '.join(v.name() for v in problem.variables())}, the dual variables of its constraints "
                "(constraint.dual_variables[k]), and the constraints themselves, for the first of those."
            )
    return found


def _primal(form: CanonicalForm, variable: Any) -> Output:
    """Through the renamings of the chain, then the layout of the variable's attributes."""
    number = variable.id
    lowered: Any = variable
    logarithmic = False
    for kind in (Dgp2Dcp, CvxAttr2Constr):
        reduction = form.reduction(kind)
        renamed = {} if reduction is None else reduction.var_id_map
        if number in renamed:
            (number,) = renamed[number]
            logarithmic = logarithmic or kind is Dgp2Dcp
    program = form.program
    if number not in program.var_id_to_col:
        raise inv.ConditionsError(
            f"CvxpyLayer(variables=...): {variable} has no influence on the problem, so its value is not "
            "defined. Leave it out, or give it a place in objective or constraints."
        )
    canonical, column = program.id_to_var[number], program.var_id_to_col[number]
    places = np.arange(1.0, canonical.size + 1).reshape(canonical.shape, order="F")
    full = recover_value_for_leaf(lowered, places, project=False) if not logarithmic else places
    full = np.asarray(full.toarray() if hasattr(full, "toarray") else full)
    flat = np.rint(full.reshape(-1)).astype(np.int64)  # 0 where the value is always zero
    used = np.flatnonzero(flat)
    matrix = csr_array(
        (np.ones(len(used)), (used, column + flat[used] - 1)), shape=(len(flat), form.structure.size)
    )
    return Output("x", SparseAffine(matrix, np.zeros(len(flat))), tuple(variable.shape), logarithmic)


def _dual(form: CanonicalForm, constraint: Any, k: int) -> Output:
    m = form.structure.equations
    recover = _way_back(form, constraint, k)
    first, ones = recover(np.arange(1.0, m + 1)), recover(np.ones(m))
    shape, ones = ones.shape, ones.reshape(-1)
    used = np.flatnonzero(ones)
    place = np.rint(first.reshape(-1)[used] / ones[used]).astype(np.int64) - 1
    matrix = csr_array((ones[used], (used, place)), shape=(ones.size, m))
    probe = np.cos(np.arange(m))
    if np.abs(matrix @ probe - recover(probe).reshape(-1)).max(initial=0.0) > 1e-12:
        columns = [recover(unit).reshape(-1) for unit in np.eye(m)]
        matrix = csr_array(np.stack(columns, -1))
    return Output("y", SparseAffine(matrix, np.zeros(ones.size)), tuple(shape))


def _way_back(form: CanonicalForm, constraint: Any, k: int) -> Callable[[np.ndarray], np.ndarray]:
    """y -> the value of a constraint's dual variable, as CVXPY would have it."""
    target, last = form.target, form.inverse_data[-1]
    zero = last[target.DIMS].zero

    def recover(y: np.ndarray) -> np.ndarray:
        found = utilities.get_dual_values(y[:zero], utilities.extract_dual_value, last[target.EQ_CONSTR])
        found |= utilities.get_dual_values(y[zero:], utilities.extract_dual_value, last[target.NEQ_CONSTR])
        solution = Solution(s.OPTIMAL, 0.0, {last[target.VAR_ID]: np.zeros(form.structure.size)}, found, {})
        for reduction, inverse in zip(
            reversed(form.reductions), reversed(form.inverse_data[:-1]), strict=True
        ):
            solution = reduction.invert(solution, inverse)
        if constraint.id not in solution.dual_vars:
            raise inv.ConditionsError(
                f"CvxpyLayer(variables=...): CVXPY gives no dual value for the constraint {constraint}."
            )
        saved = [dual.value for dual in constraint.dual_variables]
        constraint.save_dual_value(solution.dual_vars[constraint.id])
        value = np.array(constraint.dual_variables[k].value, dtype=np.float64)
        for dual, before in zip(constraint.dual_variables, saved, strict=True):
            dual.save_value(before)
        return value

    return recover
