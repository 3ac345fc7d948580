"""The saddle-point matrix of a batch, reduced to what is free: what each sample fixes, keeps and measures."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticProgram
from invlayer_core.linear.saddle_point.products import largest, share, times

__all__ = ["ReducedSystem"]


@final
class ReducedSystem:
    """P, the active rows of C, and the variables that bounds leave free, of every sample.

    Parameters
    ----------
    program, active, exempt : see :class:`~invlayer_core.linear.saddle_point.dense.DenseSaddlePoint`
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

    def active_rows(self) -> Tensor:
        """``(B, k, n)``: the active rows, zero where a sample has fewer, and in fixed variables."""
        matrix = self.matrix.expand(self.count, -1, -1)
        if self.kept is not None:
            matrix = matrix.gather(1, self.kept.unsqueeze(-1).expand(-1, -1, self.n))
        matrix = matrix * self.valid.unsqueeze(-1)
        return matrix if self.free is None else matrix * self.free.unsqueeze(1)

    def reduced_hessian(self) -> Tensor:
        """P over free variables, the identity over fixed ones and in samples that are not looked at."""
        reduced = self.hessian
        if self.free is not None:
            reduced = reduced * self.free.unsqueeze(1) * self.free.unsqueeze(2)
            reduced = reduced + torch.diag_embed(1.0 - self.free)
        if self.exempt is not None and reduced.shape[0] > 1:
            reduced = reduced + torch.diag_embed(
                self.exempt.to(reduced.dtype).unsqueeze(-1).expand(-1, self.n)
            )
        return reduced

    def masked(self, rhs: Tensor) -> Tensor:
        """The right-hand side with zeros for what is not active, or not looked at."""
        allowed = self.active if self.exempt is None else self.active & ~self.exempt.unsqueeze(-1)
        linear = rhs[..., : self.n]
        if self.exempt is not None:
            linear = torch.where(self.exempt.unsqueeze(-1), torch.zeros_like(linear), linear)
        rows = torch.where(allowed, rhs[..., self.n :], torch.zeros_like(rhs[..., self.n :]))
        return torch.cat([linear, rows], -1)

    def fixed_values(self, bound: Tensor) -> Tensor | None:
        """The values of the variables that stand at a bound; zero for the others."""
        if self.free is None:
            return None
        assert self.lower is not None
        assert self.upper is not None
        return self.upper * bound[..., -self.n :] - self.lower * bound[..., : self.n]

    def rows_of(self, rhs: Tensor, fixed: Tensor | None) -> Tensor:
        """The right-hand side of the active rows, ``(V, B, k)``."""
        rows = rhs[..., self.n : self.n + self.rows]
        rows = rows / self.scales
        if fixed is not None and self.rows:
            rows = rows - times(self.matrix, fixed)
        return self.kept_of(rows) * self.valid

    def kept_of(self, rows: Tensor) -> Tensor:
        """Values of all rows, ``(V, B, rows)``, at the places of the kept ones."""
        return rows if self.kept is None else rows.gather(-1, self.kept.expand(*rows.shape[:-1], -1))

    def spread(self, multipliers: Tensor) -> Tensor:
        """``(V, B, k)`` in the places of all rows, ``(V, B, rows)``."""
        if self.kept is None:
            return multipliers
        empty = multipliers.new_zeros(*multipliers.shape[:-1], self.rows)
        return empty.scatter(-1, self.kept.expand(*multipliers.shape[:-1], -1), multipliers)

    def assembled(self, rhs: Tensor, x: Tensor, multipliers: Tensor) -> Tensor:
        """(x, μ) in the order of z, with the multipliers of the bounds from what is left of the gradient."""
        spread = self.spread(multipliers * self.valid)
        parts = [x, spread / self.scales]
        if self.free is not None:
            assert self.lower is not None
            assert self.upper is not None
            left = rhs[..., : self.n] - times(self.hessian, x) - times(self.matrix.mT, spread)
            bounds = rhs.shape[-1] - self.n - self.rows
            if self.has_lower:
                parts.append(-left * self.lower)
            if bounds > self.n or not self.has_lower:
                parts.append(left * self.upper)
        return torch.cat(parts, -1)

    def gap(self, rhs: Tensor, w: Tensor) -> Tensor:
        """What is left of the right-hand side, in its own order; bounds hold exactly."""
        x, rows = w[..., : self.n], w[..., self.n : self.n + self.rows]
        scaled = rows * self.scales
        left = rhs[..., : self.n] - times(self.hessian, x) - times(self.matrix.mT, scaled)
        if self.free is not None:
            left = left * self.free
        parts = [left]
        if self.rows:
            gap = rhs[..., self.n : self.n + self.rows] - times(self.matrix, x) * self.scales
            parts.append(gap * self.active[:, : self.rows])
        parts.append(torch.zeros_like(rhs[..., self.n + self.rows :]))
        return torch.cat(parts, -1)

    def error(self, rhs: Tensor, w: Tensor, gap: Tensor) -> Tensor:
        """The backward error, ``(V, B)``: what is left beside the terms that make it up."""
        x, rows = w[..., : self.n], w[..., self.n : self.n + self.rows]
        terms = largest(rhs[..., : self.n]) + largest(times(self.hessian, x))
        error = share(
            largest(gap[..., : self.n]), terms + (largest(rows * self.scales) if self.rows else 0.0)
        )
        if not self.rows:
            return error
        wanted, left = (v[..., self.n : self.n + self.rows] / self.scales for v in (rhs, gap))
        free = largest(rhs[..., : self.n]) / self.hessian_size  # of the order of x without constraints
        return torch.maximum(error, share(largest(left), largest(wanted) + largest(x) + free))
