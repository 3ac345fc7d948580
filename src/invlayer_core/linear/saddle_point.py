"""Batched solves with the saddle-point matrix of the constraints that are active.

    [ P   Cᵀ ] [x]   [r]
    [ C   0  ] [μ] = [s]      over the active rows of C; μ = 0 on the others

(Benzi, Golub & Liesen, Numerical solution of saddle point problems, Acta Numerica 2005, section 5). Every
sample has active rows of its own. Variables that a bound fixes are taken out; the rest is solved by the Schur
complement

    P = L Lᵀ,    S = C P⁻¹ Cᵀ,    S μ = C P⁻¹ r − s,    x = P⁻¹ (r − Cᵀμ),

two Cholesky factorisations, of which that of P is one for all samples where P is shared and nothing is fixed.
Where P alone is singular, P + ρ CᵀC takes its place and r + ρ Cᵀs that of r: the same x and μ (ibid., 5.3).
Every solution is checked against the matrix itself and refined; a sample that does not hold, or whose pivots
say that it may be singular, is solved again by its eigenvectors.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram
from invlayer_core.linear.saddle_spectrum import SpectralSolution, spectral_solution

__all__ = ["DenseSaddlePoint", "SaddleSolution"]

_ACCEPTED = 1e-10  # backward error, relative
_REFINED = 1e-13  # ... from which a step of refinement is worth its price
_PIVOTS = 1e-13  # ratio of squared pivots under which a factor may be that of a singular matrix


@final
class SaddleSolution(NamedTuple):
    """A solution, and which samples of the batch have none to rounding.

    Attributes
    ----------
    w : Tensor of shape ``(V, B, N)``
    singular : Tensor of bool, shape ``(B,)``
        Where the matrix has no inverse: w is then the minimum-norm solution.
    loose : Tensor of bool, shape ``(B,)``
        Where x is not determined: the matrix maps some (x, 0) to zero.
    unsolvable : Tensor of bool, shape ``(B,)``
        Where it has no inverse and the system no solution; w fits it as well as can be.
    """

    w: Tensor
    singular: Tensor
    loose: Tensor
    unsolvable: Tensor


@final
class DenseSaddlePoint:
    """The factors for one batch of programs and active constraints.

    Parameters
    ----------
    program : QuadraticProgram
        Of real tensors without gradient.
    active : Tensor of bool, shape ``(*batch, m)``
        Which constraints hold with equality; all rows of A among them.
    exempt : Tensor of bool, shape ``(*batch,)``, or None
        Samples that are not looked at; their solution is zero.
    """

    def __init__(self, program: QuadraticProgram, active: Tensor, exempt: Tensor | None = None) -> None:
        layout = program.layout
        self.n, self.rows, self.batch = layout.size, layout.rows, active.shape[:-1]
        self.count = self.batch.numel()
        self.active = active.reshape(self.count, active.shape[-1])
        self.exempt = None if exempt is None else exempt.reshape(self.count)
        self.hessian = self._hessian(program)
        size = self.hessian.abs().amax((-1, -2)) if self.n else self.hessian.new_ones(1)
        self.hessian_size = torch.where(size > 0, size, torch.ones_like(size))
        self._fix(program)
        self._gather(program)
        self._factorise()

    def _hessian(self, program: QuadraticProgram) -> Tensor:
        """½ (P + Pᵀ), ``(1 or B, n, n)``."""
        if "P" not in program.tensors:
            return program.tensors["q"].new_zeros(1, self.n, self.n)
        matrix = self._flat(program, "P")
        return self._spared(0.5 * (matrix + matrix.mT))

    def _flat(self, program: QuadraticProgram, name: str) -> Tensor:
        matrix = program.layout.forms[name].dense(program.tensors[name])
        leading = matrix.shape[:-2]
        if leading.numel() == 1:
            return matrix.reshape(1, *matrix.shape[-2:])
        return matrix.expand(*self.batch, *matrix.shape[-2:]).reshape(self.count, *matrix.shape[-2:])

    def _spared(self, matrix: Tensor) -> Tensor:
        """Zeros for the samples that are not looked at, which may hold anything, if they have their own."""
        if self.exempt is None or matrix.shape[0] == 1:
            return matrix
        return torch.where(self.exempt[:, None, None], torch.zeros_like(matrix), matrix)

    def _fix(self, program: QuadraticProgram) -> None:
        """Which variables stand at a bound: on which side, and which are free."""
        self.lower, self.upper, self.free = None, None, None
        bounds = self.active[:, self.rows :]
        if not bounds.shape[1]:
            return
        zero = torch.zeros_like(bounds[:, : self.n])
        self.has_lower = "lb" in program.tensors
        self.lower = bounds[:, : self.n] if self.has_lower else zero
        self.upper = bounds[:, -self.n :] if "ub" in program.tensors else zero
        self.upper = self.upper & ~self.lower
        self.free = (~(self.lower | self.upper)).to(self.hessian.dtype)

    def _gather(self, program: QuadraticProgram) -> None:
        """The active rows of A and G, scaled to norm 1, as many for each sample as the most that one has."""
        names = [name for name in ("A", "G") if name in program.tensors]
        self.scales = self.hessian.new_ones(1, 0)
        self.matrix = self.hessian.new_zeros(1, 0, self.n)
        self.kept: Tensor | None = None
        self.valid = self.active[:, :0]
        if not names:
            return
        parts = [self._flat(program, name) for name in names]
        count = max(part.shape[0] for part in parts)
        matrix = parts[0] if len(parts) == 1 else torch.cat([p.expand(count, -1, -1) for p in parts], 1)
        matrix = self._spared(matrix)
        norms = torch.linalg.vector_norm(matrix, dim=-1)
        self.scales = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.matrix = matrix / self.scales.unsqueeze(-1)
        self.valid = self.active[:, : self.rows]
        if self.exempt is not None:
            self.valid = self.valid & ~self.exempt.unsqueeze(-1)
        if self.valid.device.type == "cpu":  # elsewhere the number would have to be asked for
            most = int(self.valid.sum(1).max()) if self.count else 0
            if self.count > 1:  # no more than n are independent: a size that no single sample decides
                most = max(most, min(self.rows, self.n))
            if most < self.rows:
                self.kept = torch.argsort(self.valid.to(torch.uint8), dim=1, descending=True, stable=True)[
                    :, :most
                ]
                self.valid = self.valid.gather(1, self.kept)

    def _active_rows(self) -> Tensor:
        """``(B, k, n)``: the active rows, zero where a sample has fewer, and in fixed variables."""
        matrix = self.matrix.expand(self.count, -1, -1)
        if self.kept is not None:
            matrix = matrix.gather(1, self.kept.unsqueeze(-1).expand(-1, -1, self.n))
        matrix = matrix * self.valid.unsqueeze(-1)
        return matrix if self.free is None else matrix * self.free.unsqueeze(1)

    def _factorise(self) -> None:
        reduced = self.hessian
        if self.free is not None:
            reduced = reduced * self.free.unsqueeze(1) * self.free.unsqueeze(2)
            reduced = reduced + torch.diag_embed(1.0 - self.free)
        if self.exempt is not None and reduced.shape[0] > 1:
            reduced = reduced + torch.diag_embed(
                self.exempt.to(reduced.dtype).unsqueeze(-1).expand(-1, self.n)
            )
        self.lower_factor, info = torch.linalg.cholesky_ex(reduced)
        doubtful = (info > 0) | _may_be_singular(self.lower_factor)
        shared = reduced.shape[0] == 1 and self.matrix.shape[0] == 1
        self.rho: Tensor | None = None
        self.own_rows: Tensor | None = None
        if bool(doubtful.any()):
            shared = False
            self._augment(reduced, doubtful)
        if shared and self.free is None:
            complement = self._complement_of_shared()
        else:
            self.own_rows = self._active_rows()
            half = torch.linalg.solve_triangular(self.lower_factor, self.own_rows.mT, upper=False)
            complement = half.mT @ half
        complement = complement + torch.diag_embed((~self.valid).to(complement.dtype))
        self.schur_factor, info = torch.linalg.cholesky_ex(complement)
        self.doubtful = (info > 0) | _may_be_singular(self.schur_factor) | self._doubtful_hessian

    def _augment(self, reduced: Tensor, doubtful: Tensor) -> None:
        """P + ρ CᵀC in place of a singular P."""
        self.own_rows = self._active_rows()
        size = reduced.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
        size = torch.where(size > 0, size, torch.ones_like(size))
        self.rho = torch.where(doubtful, size, torch.zeros_like(size)).expand(self.count)
        augmented = reduced + self.rho[:, None, None] * (self.own_rows.mT @ self.own_rows)
        self.lower_factor, info = torch.linalg.cholesky_ex(augmented)
        self._doubtful_hessian = (info > 0) | _may_be_singular(self.lower_factor)

    _doubtful_hessian: Tensor | bool = False

    def _complement_of_shared(self) -> Tensor:
        """S for every sample, out of the one for all rows."""
        half = torch.linalg.solve_triangular(self.lower_factor[0], self.matrix[0].mT, upper=False)
        whole = half.mT @ half
        if self.kept is None:
            return whole * (self.valid.unsqueeze(1) & self.valid.unsqueeze(2))
        picked = whole[self.kept.unsqueeze(2), self.kept.unsqueeze(1)]
        return picked * (self.valid.unsqueeze(1) & self.valid.unsqueeze(2))

    def solve(self, rhs: Tensor) -> SaddleSolution:
        """w for right-hand sides ``(V, B, n + m)``; what stands for inactive constraints is ignored."""
        rhs = self._masked(rhs)
        w = self._once(rhs)
        gap = self._gap(rhs, w)
        error = self._error(rhs, w, gap)
        if bool((error > _REFINED).any()):
            better = w + self._once(gap)
            improved = self._error(rhs, better, self._gap(rhs, better))
            gains = (improved < error) & (error > _REFINED)  # False for NaN
            w = torch.where(gains.unsqueeze(-1), better, w)
            error = torch.where(gains, improved, error)
        bad = (~(error <= _ACCEPTED)).any(0) | self.doubtful
        if self.exempt is not None:
            bad = bad & ~self.exempt
        nothing = torch.zeros_like(bad)
        return (
            self._by_spectrum(rhs, w, bad)
            if bool(bad.any())
            else SaddleSolution(w, nothing, nothing, nothing)
        )

    def _masked(self, rhs: Tensor) -> Tensor:
        allowed = self.active if self.exempt is None else self.active & ~self.exempt.unsqueeze(-1)
        linear = rhs[..., : self.n]
        if self.exempt is not None:
            linear = torch.where(self.exempt.unsqueeze(-1), torch.zeros_like(linear), linear)
        rows = torch.where(allowed, rhs[..., self.n :], torch.zeros_like(rhs[..., self.n :]))
        return torch.cat([linear, rows], -1)

    def _once(self, rhs: Tensor) -> Tensor:
        """One solve with the factors."""
        linear, bound = rhs[..., : self.n], rhs[..., self.n + self.rows :]
        fixed = self._fixed_values(bound)
        if fixed is not None and self.free is not None:
            linear = (linear - _times(self.hessian, fixed)) * self.free
        rows = self._rows_of(rhs, fixed)
        if self.rho is not None:
            linear = linear + self.rho.unsqueeze(-1) * self._pull(rows)
        x = _cholesky_solve(self.lower_factor, linear)
        multipliers = _cholesky_solve(self.schur_factor, (self._push(x) - rows) * self.valid)
        x = _cholesky_solve(self.lower_factor, linear - self._pull(multipliers))
        if self.free is not None:
            x = x * self.free
        return self._assemble(rhs, x if fixed is None else x + fixed, multipliers)

    def _fixed_values(self, bound: Tensor) -> Tensor | None:
        """The values of the variables that stand at a bound; zero for the others."""
        if self.free is None:
            return None
        assert self.lower is not None
        assert self.upper is not None
        return self.upper * bound[..., -self.n :] - self.lower * bound[..., : self.n]

    def _rows_of(self, rhs: Tensor, fixed: Tensor | None) -> Tensor:
        """The right-hand side of the active rows, ``(V, B, k)``."""
        rows = rhs[..., self.n : self.n + self.rows]
        rows = rows / self.scales
        if fixed is not None and self.rows:
            rows = rows - _times(self.matrix, fixed)
        return self._kept_of(rows) * self.valid

    def _kept_of(self, rows: Tensor) -> Tensor:
        return rows if self.kept is None else rows.gather(-1, self.kept.expand(*rows.shape[:-1], -1))

    def _push(self, x: Tensor) -> Tensor:
        """C x for the active rows, ``(V, B, k)``."""
        if self.own_rows is not None:
            return _times(self.own_rows, x)
        return self._kept_of(_times(self.matrix, x))

    def _pull(self, multipliers: Tensor) -> Tensor:
        """Cᵀμ from the active rows, ``(V, B, n)``; in fixed variables zero."""
        if self.own_rows is not None:
            return _times(self.own_rows.mT, multipliers)
        return _times(self.matrix.mT, self._spread(multipliers * self.valid))

    def _spread(self, multipliers: Tensor) -> Tensor:
        """``(V, B, k)`` in the places of all rows, ``(V, B, rows)``."""
        if self.kept is None:
            return multipliers
        empty = multipliers.new_zeros(*multipliers.shape[:-1], self.rows)
        return empty.scatter(-1, self.kept.expand(*multipliers.shape[:-1], -1), multipliers)

    def _assemble(self, rhs: Tensor, x: Tensor, multipliers: Tensor) -> Tensor:
        """(x, μ) in the order of z, with the multipliers of the bounds from what is left of the gradient."""
        spread = self._spread(multipliers * self.valid)
        parts = [x, spread / self.scales]
        if self.free is not None:
            assert self.lower is not None
            assert self.upper is not None
            left = rhs[..., : self.n] - _times(self.hessian, x) - _times(self.matrix.mT, spread)
            bounds = rhs.shape[-1] - self.n - self.rows
            if self.has_lower:
                parts.append(-left * self.lower)
            if bounds > self.n or not self.has_lower:
                parts.append(left * self.upper)
        return torch.cat(parts, -1)

    def _gap(self, rhs: Tensor, w: Tensor) -> Tensor:
        """What is left of the right-hand side, in its own order; bounds hold exactly."""
        x, rows = w[..., : self.n], w[..., self.n : self.n + self.rows]
        scaled = rows * self.scales
        left = rhs[..., : self.n] - _times(self.hessian, x) - _times(self.matrix.mT, scaled)
        if self.free is not None:
            left = left * self.free
        parts = [left]
        if self.rows:
            gap = rhs[..., self.n : self.n + self.rows] - _times(self.matrix, x) * self.scales
            parts.append(gap * self.active[:, : self.rows])
        parts.append(torch.zeros_like(rhs[..., self.n + self.rows :]))
        return torch.cat(parts, -1)

    def _error(self, rhs: Tensor, w: Tensor, gap: Tensor) -> Tensor:
        """The backward error, ``(V, B)``: what is left beside the terms that make it up."""
        x, rows = w[..., : self.n], w[..., self.n : self.n + self.rows]
        terms = _largest(rhs[..., : self.n]) + _largest(_times(self.hessian, x))
        error = _share(
            _largest(gap[..., : self.n]), terms + (_largest(rows * self.scales) if self.rows else 0.0)
        )
        if not self.rows:
            return error
        wanted, left = (v[..., self.n : self.n + self.rows] / self.scales for v in (rhs, gap))
        free = _largest(rhs[..., : self.n]) / self.hessian_size  # of the order of x without constraints
        return torch.maximum(error, _share(_largest(left), _largest(wanted) + _largest(x) + free))

    def _by_spectrum(self, rhs: Tensor, w: Tensor, bad: Tensor) -> SaddleSolution:
        singular, loose, unsolvable = (torch.zeros_like(bad) for _ in range(3))
        w = w.clone()
        for index in bad.nonzero().reshape(-1).tolist():
            found = self._spectral(rhs, index)
            w[:, index] = found.w
            singular[index], loose[index], unsolvable[index] = found[1:]
        return SaddleSolution(w, singular, loose, unsolvable)

    def _spectral(self, rhs: Tensor, index: int) -> SpectralSolution:
        """One sample by the eigenvectors of its matrix, over free variables and active rows."""
        hessian = self.hessian[index % self.hessian.shape[0]]
        matrix = self.matrix[index % self.matrix.shape[0]][self.active[index, : self.rows]]
        free = slice(None) if self.free is None else self.free[index] > 0
        fixed = self._fixed_values(rhs[..., self.n + self.rows :])
        linear, rows = rhs[:, index, : self.n], rhs[:, index, self.n : self.n + self.rows]
        kept = self.active[index, : self.rows]
        scales = self.scales[index % self.scales.shape[0]][kept]
        rows = rows[:, kept]
        if fixed is not None:
            linear = linear - fixed[:, index] @ hessian
            rows = rows - (fixed[:, index] @ matrix.mT) * scales
        part, lines = hessian[free][:, free], matrix[:, free]
        found = spectral_solution(part, lines, scales, linear[:, free], rows)
        x = torch.zeros_like(linear)
        x[:, free] = found.w[:, : part.shape[0]]
        multipliers = rhs.new_zeros(rhs.shape[0], self.rows)
        multipliers[:, kept] = found.w[:, part.shape[0] :] * scales
        if fixed is not None:
            x = x + fixed[:, index]
        return found._replace(w=self._assemble_one(rhs, index, x, multipliers))

    def _assemble_one(self, rhs: Tensor, index: int, x: Tensor, multipliers: Tensor) -> Tensor:
        parts = [x, multipliers / self.scales[index % len(self.scales)]]
        if self.free is not None:
            assert self.lower is not None
            assert self.upper is not None
            hessian = self.hessian[index % self.hessian.shape[0]]
            matrix = self.matrix[index % self.matrix.shape[0]]
            left = rhs[:, index, : self.n] - x @ hessian - multipliers @ matrix
            if self.has_lower:
                parts.append(-left * self.lower[index])
            if rhs.shape[-1] - self.n - self.rows > self.n or not self.has_lower:
                parts.append(left * self.upper[index])
        return torch.cat(parts, -1)


def _may_be_singular(factor: Tensor) -> Tensor:
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    if not pivots.shape[-1]:
        return torch.zeros(pivots.shape[:-1], dtype=torch.bool, device=pivots.device)
    return ~(pivots.amin(-1) > _PIVOTS * pivots.amax(-1))  # True for NaN


def _cholesky_solve(factor: Tensor, rhs: Tensor) -> Tensor:
    """Solve with ``(1 or B, n, n)`` for ``(V, B, n)``."""
    if not rhs.shape[-1]:
        return rhs
    if factor.shape[0] == 1:
        flat = rhs.reshape(-1, rhs.shape[-1]).mT
        return torch.cholesky_solve(flat, factor[0]).mT.reshape(rhs.shape)
    return torch.cholesky_solve(rhs.permute(1, 2, 0), factor).permute(2, 0, 1)


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``(1 or B, m, n)`` times ``(V, B, n)``."""
    if matrix.shape[0] == 1:
        return vectors @ matrix[0].mT
    return (matrix @ vectors.permute(1, 2, 0)).permute(2, 0, 1)


def _largest(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(-1) if vectors.shape[-1] else vectors.new_zeros(vectors.shape[:-1])


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / torch.where(whole > 0, whole, torch.ones_like(whole))
