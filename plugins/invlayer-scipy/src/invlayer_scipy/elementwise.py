"""Adapter for ``scipy.optimize.elementwise``: scalar equations, all of a batch in one call.

SciPy calls its function with those elements that are not solved yet, in arrays of changing length. An array
of row numbers goes with them through ``args``, and tells which rows of the batch they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from scipy.optimize import elementwise
from torch import Tensor

from invlayer_core import BatchProblem, ConditionsError, Solver, SolverResult
from invlayer_scipy.options import check_names
from invlayer_scipy.scalar import check_scalar

__all__ = ["FindRoot"]

_OPTIONS: Final = ("bracket", "tolerances", "maxiter", "bracket_root")
_TOLERANCES: Final = ("xatol", "xrtol", "fatol", "frtol")
_BRACKET_ROOT: Final = ("xr0", "xmin", "xmax", "factor", "maxiter")

_FOUND: Final[Mapping[int, str]] = {
    0: "The algorithm converged to the specified tolerances.",
    -1: "The initial bracket was invalid.",
    -2: "The maximum number of iterations was reached.",
    -3: "A non-finite value was encountered.",
}
_BRACKETED: Final[Mapping[int, str]] = {
    -1: "The bracket expanded to the allowable limits without success.",
    -2: "The maximum number of iterations was reached.",
    -3: "A non-finite value was encountered.",
    -5: "The initial bracket does not satisfy xmin <= xl0 < xr0 < xmax.",
}


@final
@dataclass(frozen=True)
class FindRoot(Solver):
    """``scipy.optimize.elementwise.find_root``: Chandrupatla's method, vectorised.

    Options are ``bracket``, a pair (lo, hi) of numbers or of tensors in the batch shape, and SciPy's
    ``tolerances`` and ``maxiter``. Without a bracket, ``bracket_root`` looks for one from y0; its own options
    go into a dict ``"bracket_root"``.

    References
    ----------
    Chandrupatla, Advances in Engineering Software 28 (1997) 145.
    """

    batched = True

    def solve(self, problem: BatchProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        """Find the B roots; success, message and iterations are SciPy's, for each sample.

        Raises
        ------
        TypeError
            If an option is unknown.
        ConditionsError
            If the problem is not scalar, or an option has a value for neither one nor every sample.
        """
        settings = dict(options)
        check_names(settings, _OPTIONS, "scipy.find_root")
        check_names(settings.get("tolerances") or {}, _TOLERANCES, "scipy.find_root, tolerances")
        check_names(settings.get("bracket_root") or {}, _BRACKET_ROOT, "scipy.find_root, bracket_root")
        check_scalar(problem, "scipy.find_root")
        if problem.batch == 0:
            return SolverResult(y0, message="The batch is empty.")
        equations = _Equations(problem, y0)
        lo, hi, sought = _bracket(equations, settings)
        with np.errstate(all="ignore"):
            found = elementwise.find_root(
                equations.value,
                (lo, hi),
                args=(equations.rows,),
                tolerances=settings.get("tolerances"),
                maxiter=settings.get("maxiter"),
            )
        return _result(found, sought, lo, y0)


@final
class _Equations:
    """F of a batch of scalar equations, evaluated at any of its rows."""

    def __init__(self, problem: BatchProblem, y0: Tensor) -> None:
        self.problem, self.rest = problem, torch.nan_to_num(y0)
        self.start = self.numpy(y0[:, 0])
        self.rows = np.arange(problem.batch)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        array: np.ndarray = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
        return array

    def value(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """F at x, of shape ``(k,)``, in these rows, which all differ."""
        return self._evaluate(x, rows.astype(np.int64))

    def repeated(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """F at x in rows that may occur more than once; one evaluation for those that differ."""
        rows = rows.astype(np.int64)
        values, left = np.empty(x.shape), np.ones(x.shape, dtype=bool)
        while left.any():  # bracket_root walks to both sides of a row at once
            _, first = np.unique(np.where(left, rows, -1), return_index=True)
            first = first[left[first]]
            values[first] = self._evaluate(x[first], rows[first])
            left[first] = False
        return values

    def _evaluate(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if len(rows) == self.problem.batch:  # every row, in order
            return self.numpy(self.problem.residual(torch.as_tensor(x).to(self.rest).unsqueeze(-1))[:, 0])
        index = torch.as_tensor(rows, device=self.rest.device)
        y = self.rest.clone()
        y[index, 0] = torch.as_tensor(x).to(y)
        return self.numpy(self.problem.residual(y)[index, 0])

    def spread(self, value: Any, name: str) -> np.ndarray:
        """An option as one float64 for each sample."""
        array = self.numpy(value) if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
        if array.size not in (1, self.problem.batch):
            raise ConditionsError(
                f"scipy.find_root: {name} has shape {array.shape}; accepted is one number, or a tensor in "
                f"the batch shape of y0, which has {self.problem.batch} samples."
            )
        return np.broadcast_to(array.reshape(-1), (self.problem.batch,)).copy()


def _bracket(
    equations: _Equations, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Both ends, and the status of the search for them if they were not given."""
    if (given := settings.get("bracket")) is not None:
        if settings.get("bracket_root") is not None:
            raise ValueError("scipy.find_root: bracket and bracket_root exclude each other; leave one out.")
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise TypeError(f"scipy.find_root: bracket={given!r}; accepted is a pair (lo, hi).")
        return equations.spread(given[0], "bracket[0]"), equations.spread(given[1], "bracket[1]"), None
    search = dict(settings.get("bracket_root") or {})
    ends = {name: equations.spread(search[name], name) for name in _BRACKET_ROOT[:4] if name in search}
    steps = {"maxiter": search["maxiter"]} if "maxiter" in search else {}
    with np.errstate(all="ignore"):
        found = elementwise.bracket_root(
            equations.repeated, equations.start, args=(equations.rows,), **ends, **steps
        )
    return *found.bracket, found.status


def _result(found: Any, sought: np.ndarray | None, lo: np.ndarray, y0: Tensor) -> SolverResult:
    words = [_FOUND.get(int(status), f"status {status}") for status in found.status]
    if sought is not None:
        words = [_BRACKETED.get(int(s), word) if s else word for s, word in zip(sought, words, strict=True)]
    # SciPy has NaN where it found nothing; an iterate says more, and what it is worth is measured.
    best = np.where(np.isfinite(found.x), found.x, lo)
    y = torch.as_tensor(best).to(y0).reshape(y0.shape)
    return SolverResult(
        y=torch.where(y.isfinite(), y, y0),
        success=torch.as_tensor(np.asarray(found.success, dtype=bool), device=y0.device),
        iterations=torch.as_tensor(np.asarray(found.nit, dtype=np.int64), device=y0.device),
        message=tuple(words),
        aux={"nfev": np.asarray(found.nfev)},
    )
