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

from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram
from invlayer_core.linear.saddle_point.products import cholesky_solve, may_be_singular, times
from invlayer_core.linear.saddle_point.reduced import ReducedSystem
from invlayer_core.linear.saddle_point.solution import SaddleSolution
from invlayer_core.linear.saddle_point.spectrum import spectral_sample

__all__ = ["DenseSaddlePoint"]

_ACCEPTED = 1e-10  # backward error, relative
_REFINED = 1e-13  # ... from which a step of refinement is worth its price


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
        self.system = ReducedSystem(program, active, exempt)
        self.rho: Tensor | None = None
        self.own_rows: Tensor | None = None
        self._factorise()

    def _factorise(self) -> None:
        system = self.system
        reduced = system.reduced_hessian()
        self.lower_factor, info = torch.linalg.cholesky_ex(reduced)
        doubtful = (info > 0) | may_be_singular(self.lower_factor)
        shared = reduced.shape[0] == 1 and system.matrix.shape[0] == 1
        doubtful_hessian: Tensor | bool = False
        if bool(doubtful.any()):
            shared = False
            doubtful_hessian = self._augment(reduced, doubtful)
        if shared and system.free is None:
            complement = self._complement_of_shared()
        else:
            self.own_rows = system.active_rows()
            half = torch.linalg.solve_triangular(self.lower_factor, self.own_rows.mT, upper=False)
            complement = half.mT @ half
        complement = complement + torch.diag_embed((~system.valid).to(complement.dtype))
        self.schur_factor, info = torch.linalg.cholesky_ex(complement)
        self.doubtful = (info > 0) | may_be_singular(self.schur_factor) | doubtful_hessian

    def _augment(self, reduced: Tensor, doubtful: Tensor) -> Tensor:
        """P + ρ CᵀC in place of a singular P; where that may be singular, too."""
        own_rows = self.system.active_rows()
        size = reduced.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
        size = torch.where(size > 0, size, torch.ones_like(size))
        self.rho = torch.where(doubtful, size, torch.zeros_like(size)).expand(self.system.count)
        augmented = reduced + self.rho[:, None, None] * (own_rows.mT @ own_rows)
        self.lower_factor, info = torch.linalg.cholesky_ex(augmented)
        return (info > 0) | may_be_singular(self.lower_factor)

    def _complement_of_shared(self) -> Tensor:
        """S for every sample, out of the one for all rows."""
        kept, valid = self.system.kept, self.system.valid
        half = torch.linalg.solve_triangular(self.lower_factor[0], self.system.matrix[0].mT, upper=False)
        whole = half.mT @ half
        if kept is None:
            return whole * (valid.unsqueeze(1) & valid.unsqueeze(2))
        picked = whole[kept.unsqueeze(2), kept.unsqueeze(1)]
        return picked * (valid.unsqueeze(1) & valid.unsqueeze(2))

    def solve(self, rhs: Tensor) -> SaddleSolution:
        """w for right-hand sides ``(V, B, n + m)``; what stands for inactive constraints is ignored."""
        system = self.system
        rhs = system.masked(rhs)
        w = self._once(rhs)
        gap = system.gap(rhs, w)
        error = system.error(rhs, w, gap)
        if bool((error > _REFINED).any()):
            better = w + self._once(gap)
            improved = system.error(rhs, better, system.gap(rhs, better))
            gains = (improved < error) & (error > _REFINED)  # False for NaN
            w = torch.where(gains.unsqueeze(-1), better, w)
            error = torch.where(gains, improved, error)
        bad = (~(error <= _ACCEPTED)).any(0) | self.doubtful
        if system.exempt is not None:
            bad = bad & ~system.exempt
        nothing = torch.zeros_like(bad)
        return (
            self._by_spectrum(rhs, w, bad)
            if bool(bad.any())
            else SaddleSolution(w, nothing, nothing, nothing)
        )

    def _once(self, rhs: Tensor) -> Tensor:
        """One solve with the factors."""
        system = self.system
        linear = rhs[..., : system.n]
        fixed = system.fixed_values(rhs[..., system.n + system.rows :])
        if fixed is not None and system.free is not None:
            linear = (linear - times(system.hessian, fixed)) * system.free
        rows = system.rows_of(rhs, fixed)
        if self.rho is not None:
            linear = linear + self.rho.unsqueeze(-1) * self._pull(rows)
        x = cholesky_solve(self.lower_factor, linear)
        multipliers = cholesky_solve(self.schur_factor, (self._push(x) - rows) * system.valid)
        x = cholesky_solve(self.lower_factor, linear - self._pull(multipliers))
        if system.free is not None:
            x = x * system.free
        return system.assembled(rhs, x if fixed is None else x + fixed, multipliers)

    def _push(self, x: Tensor) -> Tensor:
        """C x for the active rows, ``(V, B, k)``."""
        if self.own_rows is not None:
            return times(self.own_rows, x)
        return self.system.kept_of(times(self.system.matrix, x))

    def _pull(self, multipliers: Tensor) -> Tensor:
        """Cᵀμ from the active rows, ``(V, B, n)``; in fixed variables zero."""
        system = self.system
        if self.own_rows is not None:
            return times(self.own_rows.mT, multipliers)
        return times(system.matrix.mT, system.spread(multipliers * system.valid))

    def _by_spectrum(self, rhs: Tensor, w: Tensor, bad: Tensor) -> SaddleSolution:
        singular, loose, unsolvable = (torch.zeros_like(bad) for _ in range(3))
        w = w.clone()
        for index in bad.nonzero().reshape(-1).tolist():
            found = spectral_sample(self.system, rhs, index)
            w[:, index] = found.w
            singular[index], loose[index], unsolvable[index] = found[1:]
        return SaddleSolution(w, singular, loose, unsolvable)
