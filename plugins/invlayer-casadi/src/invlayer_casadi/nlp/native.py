"""An ``nlpsol`` or ``qpsol`` Function as a solver of its own conditions, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

import casadi as ca
import numpy as np
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import ThreadFunctions
from invlayer_casadi.rootfinding.registered import iterations_of
from invlayer_core import BatchProblem, Solver, SolverResult

__all__ = ["NativeNlp"]

_GIVEN: Final = ("p", "lbx", "ubx", "lbg", "ubg")
_INPUTS: Final = ("x0", "p", "lbx", "ubx", "lbg", "ubg", "lam_x0", "lam_g0")


@final
class NativeNlp(Solver):
    """CasADi's solver; z0 holds the guess (x, λ, ν), and ``options`` ``p, lbx, ubx, lbg, ubg, unit``.

    Parameters
    ----------
    function : casadi.Function
        With the inputs and outputs of ``casadi.nlpsol``.
    threads : int
        How many samples are solved at a time.
    """

    batched = True

    def __init__(self, function: ca.Function, threads: int) -> None:
        self.function, self.threads = function, threads
        self._functions = ThreadFunctions(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeNlp, (self.function, self.threads)

    @property
    def label(self) -> str:
        return f"CasADi's {self.function.class_name()} {self.function.name()!r}"

    def solve(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        """Solve the B problems; success, message and iterations are CasADi's, for each sample."""
        n, m = self._sizes
        z = y0.detach().to("cpu", torch.float64, copy=True).contiguous().numpy()
        given = {name: _rows(options[name], problem.batch) for name in _GIVEN}
        units = _rows(options["unit"], problem.batch)
        z[:, n:] *= units
        reports: list[Any] = [None] * problem.batch

        def solve_rows(start: int) -> None:
            for i in range(start, problem.batch, self.threads):
                row = {name: rows[i] for name, rows in given.items()}
                guess = {
                    "x0": z[i, :n].copy(),
                    "lam_g0": z[i, n : n + m].copy(),
                    "lam_x0": z[i, n + m :].copy(),
                }
                reports[i] = self._solve_one(row | guess, z[i])

        if self.threads == 1:
            solve_rows(0)
        else:
            with ThreadPoolExecutor(self.threads, "invlayer-casadi") as pool:
                list(pool.map(solve_rows, range(self.threads)))
        z[:, n:] /= units
        return SolverResult(
            y=torch.from_numpy(z).to(y0),
            success=torch.tensor([report[0] for report in reports], dtype=torch.bool),
            iterations=torch.tensor([report[1] for report in reports], dtype=torch.int64),
            message=tuple(report[2] for report in reports),
        )

    @property
    def _sizes(self) -> tuple[int, int]:
        """n and m."""
        return self.function.numel_in("x0"), self.function.numel_in("lam_g0")

    def _solve_one(self, row: Mapping[str, np.ndarray], z: np.ndarray) -> tuple[Any, ...]:
        """Leave the solution in z; success, iterations and message."""
        n, m = self._sizes
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
                return False, -1, str(error).strip()
            stats = _stats(buffer)
        success = bool(stats.get("success", True))
        return success, iterations_of(stats), str(stats.get("return_status", ""))


def _stats(buffer: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = buffer.stats()
    except RuntimeError:  # of a Function around the solver
        return {}
    return found


def _rows(tensor: Tensor, batch: int) -> np.ndarray:
    """``(B, k)`` in float64 NumPy, contiguous."""
    array: np.ndarray = tensor.detach().reshape(batch, -1).to("cpu", torch.float64).contiguous().numpy()
    return array
