"""From a CVXPY problem to a cone program whose data are one sparse affine map of the parameters.

The rewriting is CVXPY's own chain for Clarabel, stopped before any number is put in: Dcp2Cone,
CvxAttr2Constr, cone rewritings, ConeMatrixStuffing. Inside ``quad_form_dpp_scope`` a parametric ``quad_form``
stays quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import cvxpy as cp
import numpy as np
import torch
from cvxpy.constraints import PowConeND
from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL
from cvxpy.reductions.solvers.solver import Solver as CvxpySolver
from cvxpy.utilities.scopes import quad_form_dpp_scope
from scipy.sparse import coo_array, csc_array, csr_array

import invlayer_core as inv

__all__ = ["AffineData", "CanonicalForm", "canonicalise"]


@final
class _Target(CLARABEL):  # type: ignore[misc]
    """Clarabel's canonical form, with power cones of three dimensions alone."""

    SUPPORTED_CONSTRAINTS = [c for c in CLARABEL.SUPPORTED_CONSTRAINTS if c is not PowConeND]  # noqa: RUF012

    def name(self) -> str:
        return "INVLAYER"


@final
@dataclass(frozen=True)
class AffineData:
    """One of P, q, A, b: ``matrix @ θ + offset``, in the order of the structure's entries."""

    matrix: csr_array
    offset: np.ndarray


@final
@dataclass(frozen=True)
class CanonicalForm:
    """A cone program with parameters, and CVXPY's way back from its solution.

    Attributes
    ----------
    structure : ConeStructure
    data : dict of AffineData
        P, q, A and b.
    parameters : list of (cvxpy.Parameter, int)
        The parameters of the canonical form, and where each begins in θ.
    program : ParamConeProg
    reductions, inverse_data : list
        CVXPY's chain, and what it needs to go back.
    target : Solver
        The end of the chain.
    """

    structure: inv.ConeStructure
    data: dict[str, AffineData]
    parameters: list[tuple[Any, int]]
    program: Any
    reductions: list[Any]
    inverse_data: list[Any]
    target: CvxpySolver

    def reduction(self, kind: type[Any]) -> Any:
        """The reduction of that type, or None."""
        return next((each for each in self.reductions if isinstance(each, kind)), None)


def canonicalise(problem: cp.Problem, *, gp: bool) -> CanonicalForm:
    """Rewrite a problem as a cone program, once for all values of its parameters."""
    target = _Target()
    with quad_form_dpp_scope():
        chain = problem._construct_chain(
            solver=target, gp=gp, enforce_dpp=True, solver_opts={"use_quad_obj": True}
        )
        current, inverse_data = problem, []
        for reduction in chain.reductions[:-1]:
            current, inverse = reduction.apply(current)
            inverse_data.append(inverse)
    program, _, inverse = target._prepare_data_and_inv_data(current)
    inverse_data.append(inverse)
    cones = _cones(program.cone_dims)
    structure, data = _data(program, cones)
    known = program.id_to_param
    parameters = [(known[i], column) for i, column in program.param_id_to_col.items() if i in known]
    return CanonicalForm(
        structure, data, parameters, program, list(chain.reductions[:-1]), inverse_data, target
    )


def _cones(dims: Any) -> inv.Cones:
    return inv.Cones(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp, tuple(dims.p3d))


def _data(program: Any, cones: inv.Cones) -> tuple[inv.ConeStructure, dict[str, AffineData]]:
    n, m = program.x.size, cones.size
    rows, cols, entries = _split(program.A, m)
    of_A, of_b = cols < n, cols == n
    up, across, quadratic = _upper_triangle(program.P, n, program.q.shape[1])
    structure = inv.ConeStructure(
        n, cones, (torch.as_tensor(up), torch.as_tensor(across)),
        (torch.as_tensor(rows[of_A]), torch.as_tensor(cols[of_A])),
    )  # fmt: skip
    place = coo_array((np.ones(of_b.sum()), (rows[of_b], np.arange(of_b.sum()))), shape=(m, int(of_b.sum())))
    # CVXPY has A x + b in the cone, we have A x + s = b.
    return structure, {
        "P": _affine(quadratic),
        "q": _affine(csr_array(program.q)[:-1]),
        "A": _affine(-entries[of_A]),
        "b": _affine(csr_array(place @ entries[of_b])),
    }


def _split(tensor: Any, height: int) -> tuple[np.ndarray, np.ndarray, csr_array]:
    """Row and column of every possible non-zero of a matrix kept as a column by columns, and its entries."""
    flat = csr_array(tensor)
    used = np.flatnonzero(np.diff(flat.indptr))
    return used % max(height, 1), used // max(height, 1), flat[used]


def _upper_triangle(tensor: Any, n: int, width: int) -> tuple[np.ndarray, np.ndarray, csr_array]:
    """The upper triangle of the symmetric part of P: its rows, columns and entries."""
    if tensor is None:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, csr_array((0, width))
    flat = coo_array(tensor)
    row, col = flat.coords[0] % n, flat.coords[0] // n
    low, high = np.minimum(row, col), np.maximum(row, col)
    weight = np.where(row == col, 1.0, 0.5)
    merged = csr_array((flat.data * weight, (high * n + low, flat.coords[1])), shape=flat.shape)
    merged.sum_duplicates()
    used = np.flatnonzero(np.diff(merged.indptr))
    return used % n, used // n, merged[used]


def _affine(entries: csr_array) -> AffineData:
    """Apart: what multiplies θ, and the constant, which CVXPY keeps in the last column."""
    dense = csc_array(entries)
    return AffineData(csr_array(dense[:, :-1]), dense[:, [-1]].toarray().reshape(-1))
