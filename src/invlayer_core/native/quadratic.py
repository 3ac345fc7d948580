"""A batch of dense quadratic programs by one interior-point method, on whatever device they live.

Mehrotra's predictor-corrector method (Nocedal & Wright, Numerical Optimization, 2006, 16.6) on every sample
at once. All constraints, bounds among them, are C x + s = d with s > 0 and multipliers λ > 0. A step solves

    [ P + Cᵀ diag(λ/s) C   Aᵀ ] [Δx]
    [ A                    0  ] [Δν]

by two batched Cholesky factorisations. A sample that is done stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.solvers import BatchQuadraticProblem, Solver, SolverResult

__all__ = ["InteriorPoint"]

_OPTIONS = ("tol", "max_iterations")
_RIDGE = 1e-12  # keeps the factors of dependent rows of A, and of a P that is singular, from breaking down


@final
class InteriorPoint(Solver):
    """``torch.qp``; options: ``tol`` (1e-9, relative) and ``max_iterations`` (60)."""

    batched: ClassVar[bool] = True

    def solve(self, problem: BatchQuadraticProblem, y0: Tensor, options: Mapping[str, Any]) -> SolverResult:
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise TypeError(
                f"torch.qp: unknown options {', '.join(unknown)}; accepted are {', '.join(_OPTIONS)}."
            )
        run = _Run(_Program.of(problem), y0, float(options.get("tol", 1e-9)))
        done, iterations = run.iterate(int(options.get("max_iterations", 60)))
        return SolverResult(
            y=run.answer(problem), success=done, iterations=iterations, message=run.messages(done)
        )


@final
@dataclass(frozen=True)
class _Program:
    """min ½ xᵀPx + qᵀx, A x = b, C x ≤ d, with rows of norm 1 and a gradient of the order of 1.

    Attributes
    ----------
    bounded : Tensor of bool, ``(B, m)``
        Which entries of d are finite.
    scale : Tensor of shape ``(B, 1)``
        What the objective was divided by.
    equality_norms, inequality_norms : Tensor
        What the rows were divided by.
    """

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    C: Tensor
    d: Tensor
    bounded: Tensor
    scale: Tensor
    equality_norms: Tensor
    inequality_norms: Tensor

    @classmethod
    def of(cls, problem: BatchQuadraticProblem) -> _Program:
        q, n, count = problem.q, problem.size, problem.batch
        P = q.new_zeros(1, n, n) if problem.P is None else problem.P
        scale = torch.maximum(_largest(q), P.abs().amax((-1, -2)).unsqueeze(-1)).expand(count, 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        A, b, equality_norms = _normalised(problem.A, problem.b, q, n)
        C, d, inequality_norms = _normalised(*_inequalities(problem), q, n)
        d = d.expand(count, -1)
        bounded = d < torch.inf
        return cls(
            P / scale.unsqueeze(-1), q / scale, A, b, C, torch.where(bounded, d, torch.ones_like(d)),
            bounded, scale, equality_norms, inequality_norms,
        )  # fmt: skip


def _inequalities(problem: BatchQuadraticProblem) -> tuple[Tensor | None, Tensor | None]:
    """G x ≤ h and the bounds, as rows."""
    eye = torch.eye(problem.size, dtype=problem.q.dtype, device=problem.q.device).unsqueeze(0)
    rows = [
        (problem.G, problem.h),
        (-eye, None if problem.lb is None else -problem.lb),
        (eye, problem.ub),
    ]
    there = [(matrix, limit) for matrix, limit in rows if matrix is not None and limit is not None]
    if not there:
        return None, None
    lead = max(matrix.shape[0] for matrix, _ in there)
    limits = max(limit.shape[0] for _, limit in there)
    return (
        torch.cat([matrix.expand(lead, -1, -1) for matrix, _ in there], 1),
        torch.cat([limit.expand(limits, -1) for _, limit in there], 1),
    )


def _normalised(
    matrix: Tensor | None, limit: Tensor | None, like: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    if matrix is None or limit is None:
        return like.new_zeros(1, 0, n), like.new_zeros(1, 0), like.new_ones(1, 0)
    norms = torch.linalg.vector_norm(matrix, dim=-1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return matrix / norms.unsqueeze(-1), limit / norms, norms


@final
class _Point(NamedTuple):
    """An iterate, or a step; each ``(B, …)``."""

    x: Tensor
    nu: Tensor
    s: Tensor
    lam: Tensor


@final
class _Run:
    """The iteration."""

    def __init__(self, program: _Program, y0: Tensor, tol: float) -> None:
        self.program, self.tol = program, tol
        count, n = y0.shape[0], program.q.shape[-1]
        m, k = program.C.shape[1], program.A.shape[1]
        self.active_rows = program.bounded.sum(-1, keepdim=True).clamp(min=1).to(y0.dtype)
        x = y0[:, :n]
        slack = (program.d - _times(program.C, x)).expand(count, m)
        s = torch.where(program.bounded, slack.clamp(min=1.0), torch.ones_like(slack))
        lam = program.bounded.to(y0.dtype)
        self.point = _Point(x, y0.new_zeros(count, k), s, lam)

    def iterate(self, most: int) -> tuple[Tensor, Tensor]:
        """Which samples converged, and in how many iterations."""
        done = torch.zeros(self.point.x.shape[0], dtype=torch.bool, device=self.point.x.device)
        iterations = torch.zeros_like(done, dtype=torch.int64)
        for _ in range(most):
            left = self._residuals(self.point)
            done = done | self._is_small(left)
            if bool(done.all()):
                break
            step = self._step(left)
            moves = ~done & step.x.isfinite().all(-1)
            self.point = _Point(
                *(
                    torch.where(moves.unsqueeze(-1), old + new, old)
                    for old, new in zip(self.point, step, strict=True)
                )
            )
            iterations = iterations + moves
        return done, iterations

    def _residuals(self, point: _Point) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stationarity, equalities, inequalities, and the mean complementarity ``(B, 1)``."""
        program = self.program
        gradient = _times(program.P, point.x) + program.q
        gradient = gradient + _times(program.A.mT, point.nu) + _times(program.C.mT, point.lam)
        equal = _times(program.A, point.x) - program.b
        bound = (_times(program.C, point.x) + point.s - program.d) * program.bounded
        mean = (point.s * point.lam).sum(-1, keepdim=True) / self.active_rows
        return gradient, equal, bound, mean

    def _is_small(self, left: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        gradient, equal, bound, mean = left
        size = 1.0 + _largest(self.point.x)
        force = 1.0 + _largest(_times(self.program.P, self.point.x)) + _largest(self.point.lam)
        worst = torch.maximum(_largest(equal), _largest(bound)) / size
        worst = torch.maximum(worst, _largest(gradient) / force)
        return (torch.maximum(worst, mean / (size * force)) <= self.tol).squeeze(-1)

    def _step(self, left: tuple[Tensor, Tensor, Tensor, Tensor]) -> _Point:
        """Predictor, then corrector with the same factors; cut short where it would leave the interior."""
        mean, point = left[3], self.point
        factors = self._factorise()
        zero = torch.zeros_like(point.s)
        predicted = self._direction(factors, left, point.s * point.lam)
        length = torch.minimum(_longest(point.s, predicted.s), _longest(point.lam, predicted.lam))
        ahead = (point.s + length * predicted.s) * (point.lam + length * predicted.lam)
        ahead = torch.where(self.program.bounded, ahead, zero).sum(-1, keepdim=True) / self.active_rows
        # Nearer to the boundary than asked for, the factors would lose the digits of the gradient.
        centre = ((ahead / mean.clamp(min=1e-300)) ** 3 * mean).clamp(min=0.1 * self.tol)
        target = torch.where(
            self.program.bounded, point.s * point.lam + predicted.s * predicted.lam - centre, zero
        )
        direction = self._direction(factors, left, target)
        length = torch.minimum(_longest(point.s, direction.s), _longest(point.lam, direction.lam))
        length = (0.995 * length).clamp(max=1.0)
        return _Point(*(length * part for part in direction))

    def _factorise(self) -> tuple[Tensor, Tensor, Tensor]:
        program, point = self.program, self.point
        weights = point.lam / point.s
        hessian = program.P + (program.C.mT * weights.unsqueeze(-2)) @ program.C
        size = hessian.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
        n = hessian.shape[-1]
        hessian = hessian + torch.diag_embed((_RIDGE * size).expand(-1, n))
        lower, _ = torch.linalg.cholesky_ex(hessian)
        half = torch.linalg.solve_triangular(lower, program.A.mT.expand(lower.shape[0], -1, -1), upper=False)
        schur = half.mT @ half
        if schur.shape[-1]:
            size = schur.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
            schur = schur + torch.diag_embed((_RIDGE * size).expand(-1, schur.shape[-1]))
        return lower, torch.linalg.cholesky_ex(schur)[0], weights

    def _direction(
        self,
        factors: tuple[Tensor, Tensor, Tensor],
        left: tuple[Tensor, Tensor, Tensor, Tensor],
        target: Tensor,
    ) -> _Point:
        lower, schur, weights = factors
        gradient, equal, bound, _ = left
        program, point = self.program, self.point
        pushed = (point.lam * bound - target) / point.s
        rhs = -gradient - _times(program.C.mT, pushed)
        free = _solve(lower, rhs)
        nu = _solve(schur, _times(program.A, free) + equal)
        x = _solve(lower, rhs - _times(program.A.mT, nu))
        moved = _times(program.C, x)
        lam = torch.where(program.bounded, pushed + weights * moved, torch.zeros_like(moved))
        s = torch.where(program.bounded, -bound - moved, torch.zeros_like(moved))
        return _Point(x, nu, s, lam)

    def answer(self, problem: BatchQuadraticProblem) -> Tensor:
        """x and the multipliers of the problem as it was given."""
        program, point = self.program, self.point
        nu = point.nu * program.scale / program.equality_norms
        lam = point.lam * program.scale / program.inequality_norms
        return torch.cat([point.x, nu, lam], -1)

    def messages(self, done: Tensor) -> tuple[str, ...]:
        """Why a sample has no answer, where its last iterate proves it."""
        if bool(done.all()):
            return ("",) * len(done)
        program, point = self.program, self.point
        pulled = _times(program.A.mT, point.nu) + _times(program.C.mT, point.lam)
        gain = -((program.b * point.nu).sum(-1) + (program.d * point.lam).sum(-1))
        infeasible = (gain > 0) & (_largest(pulled).squeeze(-1) <= 1e-6 * gain)
        fall = -(program.q * point.x).sum(-1)
        grows = torch.maximum(_largest(_times(program.A, point.x)), _largest(_times(program.P, point.x)))
        rises = torch.where(program.bounded, _times(program.C, point.x), torch.zeros_like(point.s))
        grows = torch.maximum(grows, rises.amax(-1, keepdim=True).clamp(min=0) if rises.shape[-1] else grows)
        unbounded = (fall > 0) & (grows.squeeze(-1) <= 1e-6 * fall)
        verdicts = zip(done.tolist(), infeasible.tolist(), unbounded.tolist(), strict=True)
        return tuple(
            "" if ok else "primal infeasible" if a else "unbounded" if b else "out of iterations"
            for ok, a, b in verdicts
        )


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``(1 or B, m, n)`` times ``(1 or B, n)``."""
    if matrix.shape[0] == 1:
        return vectors @ matrix[0].mT
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)


def _solve(factor: Tensor, rhs: Tensor) -> Tensor:
    if not rhs.shape[-1]:
        return rhs
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)


def _longest(values: Tensor, step: Tensor) -> Tensor:
    """The longest step, up to 1, that keeps positive values from becoming negative: ``(B, 1)``."""
    if not values.shape[-1]:
        return values.new_ones(values.shape[0], 1)
    ratio = torch.where(step < 0, -values / torch.where(step < 0, step, -torch.ones_like(step)), torch.inf)
    return ratio.amin(-1, keepdim=True).clamp(max=1.0)


def _largest(vectors: Tensor) -> Tensor:
    """‖·‖∞, ``(B, 1)``."""
    if not vectors.shape[-1]:
        return vectors.new_zeros(*vectors.shape[:-1], 1)
    return vectors.abs().amax(-1, keepdim=True)
