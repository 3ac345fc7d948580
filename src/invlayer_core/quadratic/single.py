"""One small program, one per-sample solver: the whole way in a few NumPy calls.

For n = 2 the stations of the spine cost far more than the solver does. This module goes the same way (solve,
certify, polish, attach) for the one case that is common and plain: dense float64 tensors on the CPU without
batch dims, and no torch transform. Whatever is not plain (a solver that fails, an active set that is not
proved at once, a singular system, a second derivative) is left to the general way, which decides.

It is imported on first use: NumPy is at hand there, as a per-sample solver has been given its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.active_set import ActiveSet
from invlayer_core.conditions.quadratic import QuadraticConditions, QuadraticLayout
from invlayer_core.conditions.system import System
from invlayer_core.solvers.contract import Solver, SolverResult
from invlayer_core.solvers.quadratic import QuadraticProblem
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["solve_single"]

_EXACT, _CLEAR, _WEAK, _SIGN = 1e-11, 1e-7, 1e-9, 1e-11  # as in active_set.py
_SMALL = 40  # variables up to which the matrix is solved with as it stands
_GROWTH = 1e7
_LARGEST = 2000  # variables up to which what the general way does beside is worth leaving out


def solve_single(
    layout: QuadraticLayout,
    theta: Sequence[Tensor],
    solver: Solver,
    options: Mapping[str, Any],
    *,
    multipliers: bool = False,
) -> tuple[Tensor, ...] | None:
    """x, and the four multipliers if asked for, differentiable; None if it is not as plain as that."""
    program = _Program.of(layout, theta)
    if program is None:
        return None
    try:
        result = solver.solve(program.problem(), np.zeros(layout.size), dict(options))
    except Exception:  # the general way keeps it, and says whose it is
        return None
    if not isinstance(result, SolverResult) or not result.success:
        return None
    found = program.certified(np.asarray(result.y))
    if found is None:
        return None
    z = torch.from_numpy(found.z)
    parts = z.split(layout.sections) if multipliers else (z[: layout.size],)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in theta):
        return tuple(parts)
    rule = _Rule(layout, program, found, multipliers)
    attached: tuple[Tensor, ...] = _functorch.apply(_SingleProgram, rule, tuple(parts), *theta)
    return attached


@final
class _Certified(NamedTuple):
    """z with its active set, and the factors of its matrix if it was polished."""

    z: np.ndarray
    active: np.ndarray
    factors: _Factors | _Whole | None


@final
class _Whole(NamedTuple):
    """The whole matrix of a small program, solved with as it stands."""

    matrix: np.ndarray

    @classmethod
    def of(cls, P: np.ndarray, rows: np.ndarray) -> _Whole:
        n = len(P)
        matrix = np.zeros((n + len(rows), n + len(rows)))
        matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = P, rows.T, rows
        return cls(matrix)

    def solve(self, linear: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """x and the multipliers of the active rows; None if they do not hold, or nearly not."""
        rhs = np.concatenate([linear, limits])
        try:
            w = np.linalg.solve(self.matrix, rhs)
        except np.linalg.LinAlgError:
            return None
        size, largest = np.abs(rhs).max(), np.abs(w).max()
        left = np.abs(self.matrix @ w - rhs).max()
        if not (left <= 1e-12 * (size + largest) and largest <= _GROWTH * size):
            return None
        return w[: len(linear)], w[len(linear) :]


@final
class _Factors(NamedTuple):
    """P = L Lᵀ and the Schur complement of the active rows, as in ``linear/saddle_point/dense.py``."""

    P: Tensor
    lower: Tensor
    rows: Tensor
    half: Tensor
    schur: Tensor

    @classmethod
    def of(cls, P: Tensor, lower: Tensor, rows: Tensor) -> _Factors | None:
        """The factors; None where they may be singular."""
        half = torch.linalg.solve_triangular(lower, rows.mT, upper=False)
        schur, info = torch.linalg.cholesky_ex(half.mT @ half)
        if int(info) or _may_be_singular(lower) or _may_be_singular(schur):
            return None
        return cls(P, lower, rows, half, schur)

    def solve(self, linear: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """x and the multipliers of the active rows; None if they do not hold."""
        r, s = torch.from_numpy(linear).unsqueeze(-1), torch.from_numpy(limits).unsqueeze(-1)
        x, mu = self._once(r, s)
        for _ in range(2):
            left, gap = r - self.P @ x - self.rows.mT @ mu, s - self.rows @ x
            error = max(_share(left, r, x), _share(gap, s, torch.cat([x, r / self.P.diagonal().max()])))
            if error <= 1e-13:
                break
            step = self._once(left, gap)
            x, mu = x + step[0], mu + step[1]
        return (x.numpy()[:, 0], mu.numpy()[:, 0]) if error <= 1e-10 else None

    def _once(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.linalg.solve_triangular(self.lower, r, upper=False)
        if not len(s):
            return torch.linalg.solve_triangular(self.lower.mT, t, upper=True), s
        mu = torch.cholesky_solve(self.half.mT @ t - s, self.schur)
        return torch.linalg.solve_triangular(self.lower.mT, t - self.half @ mu, upper=True), mu


def _may_be_singular(factor: Tensor) -> bool:
    pivots = factor.diagonal().numpy()
    return bool(len(pivots)) and not pivots.min() ** 2 > 1e-13 * pivots.max() ** 2


def _share(left: Tensor, right: Tensor, x: Tensor) -> float:
    """What is left, beside the right-hand side and the solution; 0 if there is nothing."""
    if not len(left):
        return 0.0
    whole = float(right.abs().max() + x.abs().max())
    return float(left.abs().max()) / whole if whole else 0.0


@final
@dataclass(frozen=True, eq=False)
class _Program:
    """The program in NumPy: P, q, and all constraints as rows C x ≤ d."""

    layout: QuadraticLayout
    arrays: Mapping[str, np.ndarray]
    P: np.ndarray
    lower: Tensor
    C: np.ndarray
    d: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, layout: QuadraticLayout, theta: Sequence[Tensor]) -> _Program | None:
        """The program; None if it is too large, not convex or not finite."""
        arrays = {name: t.detach().numpy() for name, t in zip(layout.names, theta, strict=True)}
        n = layout.size
        P = arrays.get("P")
        if P is None or n > _LARGEST:
            return None
        if not np.array_equal(P, P.T):  # also for NaN
            P = arrays["P"] = 0.5 * (P + P.T)
        C, d = _rows(arrays, n)
        total = P.sum() + arrays["q"].sum() + C.sum()
        if not (np.isfinite(total) and not np.isnan(d).any() and bool((d > -np.inf).all())):
            return None
        if "b" in arrays and not np.isfinite(arrays["b"]).all():
            return None
        lower, info = torch.linalg.cholesky_ex(torch.from_numpy(P))
        if int(info):
            return None
        scales = np.sqrt(np.einsum("ij,ij->i", C, C))
        scales[scales == 0] = 1.0
        return cls(layout, arrays, P, lower, C, d, scales)

    def problem(self) -> QuadraticProblem:
        """For the solver, which may write into its arrays."""
        copies: dict[str, Any] = {name: array.copy() for name, array in self.arrays.items()}
        return QuadraticProblem(0, **copies)

    def certified(self, z: np.ndarray) -> _Certified | None:
        """z on an active set that it proves, polished where it is not exact."""
        n, equalities = self.layout.size, self.layout.equalities
        if z.shape != (n + len(self.d),) or not np.isfinite(z).all():
            return None
        slack, weight, error = self._measured(z)
        active = weight > slack
        active[:equalities] = True
        error = max(error, np.where(active, np.abs(slack), np.abs(weight)).max(initial=0.0))
        margin = np.maximum(slack, weight)[equalities:].min(initial=np.inf)
        if error <= _EXACT and margin >= _CLEAR:
            return _Certified(self._snapped(z, active), active, None)
        if not error <= 1e-2:
            return None
        return self._polished(active)

    def _polished(self, active: np.ndarray) -> _Certified | None:
        n, equalities = self.layout.size, self.layout.equalities
        factors = self.factors(active)
        solution = None if factors is None else factors.solve(-self.arrays["q"], self.d[active])
        if solution is None:
            return None
        z = np.zeros(n + len(self.d))
        z[:n], z[n:][active] = solution
        slack, weight, error = self._measured(z)
        wrong = np.where(active, weight, slack)[equalities:].min(initial=np.inf) < -_SIGN
        gap = np.abs(slack[active]).max(initial=0.0)
        margin = np.maximum(slack, weight)[equalities:].min(initial=np.inf)
        if wrong or not max(error, gap) <= 1e-8 or margin <= _WEAK:
            return None
        return _Certified(self._snapped(z, active), active, factors)

    def _measured(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """As ``conditions.quadratic.measure``: relative slacks, multipliers and stationarity."""
        n, q = self.layout.size, self.arrays["q"]
        x, multipliers = z[:n], z[n:]
        curved, size = self.P @ x, np.abs(x).max() or 1.0
        weight = multipliers * self.scales
        force = max(np.abs(curved).max(), np.abs(q).max(), np.abs(weight).max(initial=0.0)) or 1.0
        stationarity = curved + q + multipliers @ self.C
        slack = (self.d - self.C @ x) / (self.scales * size)
        return slack, weight / force, float(np.abs(stationarity).max() / force)

    def _snapped(self, z: np.ndarray, active: np.ndarray) -> np.ndarray:
        n, equalities = self.layout.size, self.layout.equalities
        z = z + 0.0  # a copy, without -0
        z[n:][~active] = 0.0
        np.maximum(z[n + equalities :], 0.0, out=z[n + equalities :])
        return z

    def factors(self, active: np.ndarray) -> _Factors | _Whole | None:
        """Of P and the active rows."""
        if len(self.P) <= _SMALL:
            return _Whole.of(self.P, self.C[active])
        return _Factors.of(torch.from_numpy(self.P), self.lower, torch.from_numpy(self.C[active]))


def _rows(arrays: Mapping[str, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """All constraints as C x ≤ d, those of A first."""
    rows = [arrays[name] for name in ("A", "G") if name in arrays]
    limits = [arrays[name] for name in ("b", "h") if name in arrays]
    if "lb" in arrays:
        rows.append(-np.eye(n))
        limits.append(-arrays["lb"])
    if "ub" in arrays:
        rows.append(np.eye(n))
        limits.append(arrays["ub"])
    if not rows:
        return np.zeros((0, n)), np.zeros(0)
    return (rows[0], limits[0]) if len(rows) == 1 else (np.concatenate(rows), np.concatenate(limits))


@final
@dataclass(frozen=True, eq=False)
class _Rule:
    """What the backward pass needs."""

    layout: QuadraticLayout
    program: _Program
    found: _Certified
    multipliers: bool

    def pull(self, cotangents: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None] | None:
        """θ̄; None if the linear system does not hold."""
        factors = self.found.factors or self.program.factors(self.found.active)
        n, active = self.layout.size, self.found.active
        limits = np.zeros(int(active.sum()))
        if self.multipliers:
            limits = np.concatenate([bar.numpy() for bar in cotangents[1:]])[active]
        w = None if factors is None else factors.solve(cotangents[0].contiguous().numpy(), limits)
        if w is None:
            return None
        full = np.zeros(len(self.found.z))
        full[:n], full[n:][active] = w
        return [
            torch.from_numpy(self._of(name, full)) if want else None
            for name, want in zip(self.layout.names, wanted, strict=True)
        ]

    def _of(self, name: str, w: np.ndarray) -> np.ndarray:
        n, z = self.layout.size, self.found.z
        x, wx = z[:n], w[:n]
        if name == "P":
            half = np.outer(-0.5 * wx, x)
            return half + half.T
        if name == "q":
            return -wx
        start = {"A": n, "b": n, "G": n + self.layout.equalities, "h": n + self.layout.equalities}.get(name)
        if name in ("A", "G"):
            assert start is not None
            rows = slice(start, start + self.layout.forms[name].rows)
            return np.outer(-w[rows], x) - np.outer(z[rows], wx)
        if start is not None:
            return w[start : start + len(self.program.arrays[name])]
        bounds = w[n + self.layout.rows :]
        return -bounds[:n] if name == "lb" else bounds[-n:]


@final
@_functorch.with_cached_signature
class _SingleProgram(torch.autograd.Function):
    """z, as a function of θ."""

    @staticmethod
    def forward(rule: _Rule, parts: tuple[Tensor, ...], *theta: Tensor) -> tuple[Tensor, ...]:
        return parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rule, _, *theta = inputs
        ctx.save_for_backward(*theta)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        theta, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        mapped = any(_functorch.is_mapped_by_autograd(bar) for bar in cotangents)
        plain = not torch.is_grad_enabled() and not mapped
        bars = ctx.rule.pull(cotangents, wanted) if plain else None
        return None, None, *(_general(ctx.rule, theta, cotangents, wanted) if bars is None else bars)


def _general(
    rule: _Rule, theta: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same by the general way, differentiable."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        moving = [tensor if want else tensor.detach() for tensor, want in zip(theta, wanted, strict=True)]
        z = torch.from_numpy(rule.found.z)
        shape = SystemShape(z.shape[:0], z.shape)
        system = System(QuadraticConditions(rule.layout), Arguments.flatten(tuple(moving)), shape)
        parts = ActiveSet().attach(system, z, None, torch.nan).split(rule.layout.sections)
        grads = torch.autograd.grad(
            parts[: len(cotangents)],
            [tensor for tensor, want in zip(moving, wanted, strict=True) if want],
            cotangents,
            create_graph=recorded,
            materialize_grads=True,
        )
    supply = iter(grads)
    return [next(supply) if want else None for want in wanted]
