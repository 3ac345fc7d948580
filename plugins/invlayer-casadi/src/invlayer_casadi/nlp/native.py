"""An ``nlpsol`` or ``qpsol`` Function as a solver of its own conditions, sample by sample, with warm start.

CasADi solves; Newton steps on the conditions, the primal–dual active-set method, take its 1e-8 to rounding
error and settle the active set; the matrix of the last step is handed over for the derivative.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, final

import casadi as ca
import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi.expressions.buffers import ThreadFunctions
from invlayer_casadi.nlp.factor import KKTMatrix
from invlayer_casadi.nlp.polish import polished
from invlayer_casadi.nlp.sample import SampleData, SamplePoint
from invlayer_casadi.rootfinding.registered import iterations_of
from invlayer_core import BatchProblem, Solver, SolverResult

__all__ = ["NativeNlp", "NlpSetting"]

_GIVEN: Final = ("p", "lbx", "ubx", "lbg", "ubg")
_INPUTS: Final = ("x0", "p", "lbx", "ubx", "lbg", "ubg", "lam_x0", "lam_g0")


@final
@dataclass(frozen=True)
class NlpSetting:
    """How samples are solved.

    Attributes
    ----------
    threads : int
        How many at a time.
    polish : int
        The most Newton steps after CasADi's solver.
    sparse : bool
        Whether the matrix of the last step is handed over.
    """

    threads: int
    polish: int
    sparse: bool


@final
class NativeNlp(Solver):
    """The Function with the conditions' own Newton steps; z0 holds the guess (x, λ, ν).

    ``options`` has ``p, lbx, ubx, lbg, ubg, unit``, each ``(*batch, k)``.
    """

    batched = True

    def __init__(self, function: ca.Function, point: SamplePoint, setting: NlpSetting) -> None:
        self.function, self.point, self.setting = function, point, setting
        self._functions = ThreadFunctions(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeNlp, (self.function, self.point, self.setting)

    def solve(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        """Solve the B problems; success, message and iterations are CasADi's, for each sample."""
        n, m = self.point.program.unknowns, self.point.program.constraints
        z = y0.detach().to("cpu", torch.float64, copy=True).contiguous().numpy()
        given = {name: _rows(options[name], problem.batch) for name in _GIVEN}
        units = _rows(options["unit"], problem.batch)
        z[:, n:] *= units
        reports: list[Any] = [None] * problem.batch

        def solve_rows(start: int) -> None:
            for i in range(start, problem.batch, self.setting.threads):
                row = {name: rows[i] for name, rows in given.items()}
                guess = {
                    "x0": z[i, :n].copy(),
                    "lam_g0": z[i, n : n + m].copy(),
                    "lam_x0": z[i, n + m :].copy(),
                }
                reports[i] = self._solve_one(row | guess, z[i])

        if self.setting.threads == 1:
            solve_rows(0)
        else:
            with ThreadPoolExecutor(self.setting.threads, "invlayer-casadi") as pool:
                list(pool.map(solve_rows, range(self.setting.threads)))
        z[:, n:] /= units
        return _result(z, reports, y0, units if self.setting.sparse else None, n)

    def _solve_one(self, row: Mapping[str, np.ndarray], z: np.ndarray) -> tuple[Any, ...]:
        """Leave the solution in z; success, iterations, message and matrix."""
        n, m = self.point.program.unknowns, self.point.program.constraints
        lam_g, lam_x = z[n : n + m], z[n + m :]
        nothing = np.empty(0)
        outputs = {"x": z[:n], "lam_g": lam_g, "lam_x": lam_x}
        ordered = [outputs.get(self.function.name_out(i), nothing) for i in range(self.function.n_out())]
        with self._functions.exclusive():
            buffer = self._functions.buffer(1)
            try:
                buffer([row[name] for name in _INPUTS], ordered)
            except RuntimeError as error:
                z[:] = np.nan
                return False, -1, str(error).strip(), None
            stats = _stats(buffer)
        lower, upper = (np.concatenate([row[side + "g"], row[side + "x"]]) for side in ("lb", "ub"))
        data = SampleData(row["p"], lower, upper)
        matrix = polished(self.point, z, data, self.setting.polish) if self.setting.polish else None
        if matrix is None and self.setting.sparse:
            second = self.point.second(z, data)
            at = self.point.evaluate(z, data)
            matrix = self.point.matrix(z, data, at, second)
        success = bool(stats.get("success", True))
        return success, iterations_of(stats), str(stats.get("return_status", "")), matrix


def _stats(buffer: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = buffer.stats()
    except RuntimeError:  # of a Function around the solver
        return {}
    return found


def _result(
    z: np.ndarray, reports: list[Any], like: Tensor, units: np.ndarray | None, unknowns: int
) -> SolverResult:
    factors: list[inv.linear.Factor | None] = []
    if units is not None:
        for (*_, matrix), unit in zip(reports, units, strict=True):
            factors.append(None if matrix is None else _in_units(matrix, float(unit[0]), unknowns))
    return SolverResult(
        y=torch.from_numpy(z).to(like),
        success=torch.tensor([report[0] for report in reports], dtype=torch.bool),
        iterations=torch.tensor([report[1] for report in reports], dtype=torch.int64),
        message=tuple(report[2] for report in reports),
        aux={"factor": factors} if any(factors) else {},
    )


def _in_units(matrix: KKTMatrix, unit: float, unknowns: int) -> inv.linear.Factor:
    """J times diag(1, unit, unit), as the conditions have it."""

    def scaled(vector: np.ndarray) -> np.ndarray:
        copy = np.array(vector)
        copy[unknowns:] /= unit
        return copy

    return inv.linear.Factor(
        lambda rhs: scaled(matrix.solve(rhs)), lambda rhs: matrix.solve_transposed(scaled(rhs))
    )


def _rows(tensor: Tensor, batch: int) -> np.ndarray:
    """``(B, k)`` in float64 NumPy, contiguous."""
    array: np.ndarray = tensor.detach().reshape(batch, -1).to("cpu", torch.float64).contiguous().numpy()
    return array
