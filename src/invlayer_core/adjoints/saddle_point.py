"""The solution of a saddle-point system as a differentiable function of its matrices and right-hand side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.adjoints.saddle_derivatives import matrix_bar, moved, recorded_saddle_point, sparing
from invlayer_core.conditions.quadratic import MATRICES, QuadraticLayout
from invlayer_core.errors import SingularJacobianError
from invlayer_core.linear.saddle_point.bank import SaddleBank

__all__ = ["SaddlePoint", "SaddleRule"]


@final
@dataclass(frozen=True)
class SaddleRule:
    """How the linear systems of one call are solved."""

    layout: QuadraticLayout
    settings: Implicit
    dead_value: float
    bank: SaddleBank

    @torch.no_grad()
    def solve(
        self, active: Tensor, dead: Tensor | None, matrices: Sequence[Tensor | None], rhs: Tensor
    ) -> Tensor:
        """K⁻¹ rhs, ``(*extra, *batch, N)``; of plain tensors."""
        if not rhs.numel():
            return torch.zeros_like(rhs)
        held = {name: m for name, m in zip(MATRICES, matrices, strict=True) if m is not None}
        program = self.layout.program([held.get(n, rhs[..., : self.layout.size]) for n in self.layout.names])
        factors = self.bank.factorise(program, active, dead)
        count = active.shape[:-1].numel()
        stacked = rhs.reshape(-1, count, rhs.shape[-1])
        found = factors.solve(stacked)
        w = found.w
        if bool(found.singular.any()):
            w = self._decide(w, stacked, found.singular, found.unsolvable)
        if dead is not None:
            asked = (stacked != 0).any(-1, keepdim=True)
            answer = torch.where(asked, torch.full_like(w, self.dead_value), torch.zeros_like(w))
            w = torch.where(dead.reshape(count, 1), answer, w)
        return w.reshape(rhs.shape)

    def _decide(self, w: Tensor, rhs: Tensor, singular: Tensor, unsolvable: Tensor) -> Tensor:
        policy = self.settings.singular
        asked = (rhs != 0).any(-1).any(0)
        refused = (singular if policy == "raise" else unsolvable) & asked
        if policy in ("raise", "consistent"):
            if bool(refused.any()):
                raise _singular_error(refused)
            return w
        if policy in ("nan", "zero"):
            value = torch.nan if policy == "nan" else 0.0
            return torch.where((singular & asked).unsqueeze(-1), torch.full_like(w, value), w)
        return w  # least squares


def _singular_error(singular: Tensor) -> SingularJacobianError:
    bad = singular.nonzero().reshape(-1).tolist()
    shown = ", ".join(f"sample {i}" for i in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    return SingularJacobianError(
        f"the optimality system of the quadratic program is singular at the solution of {shown}, of "
        f"{singular.numel()} samples: x, or multipliers that were asked for, are not a "
        "differentiable function of the args there (x is not unique, or active constraints depend on each "
        "other). Accepted are regular samples; or choose what a singular one should give: "
        "adjoint=Implicit(singular='consistent' | 'lstsq' | 'nan' | 'zero')."
    )


@final
@_functorch.with_cached_signature
class SaddlePoint(torch.autograd.Function):
    """K⁻¹ r, or a z that is known to be it, as a function of P, G, A and r; ``(*extra, *batch, N)``."""

    @staticmethod
    def forward(
        rule: SaddleRule,
        known: Tensor | None,
        active: Tensor,
        dead: Tensor | None,
        P: Tensor | None,
        G: Tensor | None,
        A: Tensor | None,
        rhs: Tensor,
    ) -> Tensor:
        return rule.solve(active, dead, (P, G, A), rhs) if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, _, active, dead, P, G, A, _ = inputs
        ctx.save_for_backward(output, active, dead, P, G, A)
        ctx.save_for_forward(output, active, dead, P, G, A)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        z, active, dead, *matrices = _functorch.revive(ctx.saved_tensors)
        w = _solve(ctx.rule, active, dead, matrices, cotangent, recorded=z.requires_grad)
        z = sparing(z, dead)
        wanted = ctx.needs_input_grad[4:7]
        bars = [
            matrix_bar(ctx.rule.layout, name, held, w, z) if want else None
            for name, held, want in zip(MATRICES, matrices, wanted, strict=True)
        ]
        return None, None, None, None, *bars, w

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, active, dead, *matrices = _functorch.revive(ctx.saved_tensors)
        *dots, rhs = tangents[4:]
        z = sparing(z, dead)
        change = moved(ctx.rule.layout, dots, z)
        if rhs is None:
            rhs = torch.zeros_like(z)
        rhs = rhs if change is None else rhs - change
        result: Tensor = SaddlePoint.apply(ctx.rule, None, active, dead, *matrices, rhs)
        return result

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], rule: SaddleRule, *tensors: Any) -> Any:
        known, active, dead, P, G, A, rhs = tensors
        dims = dict(zip(("known", "active", "dead", *MATRICES, "rhs"), in_dims[1:], strict=True))
        size = info.batch_size
        rank = active.ndim - (dims["active"] is not None)  # of the batch dims, and one
        extra = rhs.ndim - (dims["rhs"] is not None) - rank
        if all(dims[name] is None for name in ("active", "dead", *MATRICES)):
            mapped = [_functorch.mapped_first(t, dims[n], size) if t is not None else None
                      for n, t in (("known", known), ("rhs", rhs))]  # fmt: skip
            return SaddlePoint.apply(rule, mapped[0], active, dead, P, G, A, mapped[1]), 0
        batch = rank - 1
        matrices = [
            _with_batch_dim(t, dims[name], size, batch, rule.layout.event_dims(name))
            if t is not None
            else None
            for name, t in zip(MATRICES, (P, G, A), strict=True)
        ]
        known, rhs = (
            None if t is None else _functorch.mapped_first(t, dims[name], size).movedim(0, extra)
            for name, t in (("known", known), ("rhs", rhs))
        )
        active = _functorch.mapped_first(active, dims["active"], size)
        dead = None if dead is None else _functorch.mapped_first(dead, dims["dead"], size)
        return SaddlePoint.apply(rule, known, active, dead, *matrices, rhs), extra


def _solve(
    rule: SaddleRule,
    active: Tensor,
    dead: Tensor | None,
    matrices: Sequence[Tensor | None],
    rhs: Tensor,
    *,
    recorded: bool,
) -> Tensor:
    """K⁻¹ rhs, differentiable; also for the rhs that ``is_grads_batched`` maps, in a way of its own."""
    if not _functorch.is_mapped_by_autograd(rhs):
        if not (torch.is_grad_enabled() or _functorch.is_active() or _functorch.in_forward_mode()):
            return rule.solve(active, dead, matrices, rhs)  # nobody differentiates it again
        w: Tensor = SaddlePoint.apply(rule, None, active, dead, *matrices, rhs)
        return w
    if torch.is_grad_enabled() and (recorded or rhs.requires_grad):
        # This kind of mapping drops the graph inside a custom Function without a word.
        return recorded_saddle_point(rule.layout, rhs, active, dead, matrices, rhs, rule.dead_value)
    levels = _functorch.levels_mapped_by_autograd(rhs)
    return _functorch.map_again(rule.solve(active, dead, matrices, _functorch.plain(rhs)), levels)


def _with_batch_dim(tensor: Tensor, dim: int | None, size: int, batch: int, event_dims: int) -> Tensor:
    """A matrix with the mapped dimension in front of the batch dims, where it is one more of them."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    missing = batch - (tensor.ndim - 1 - event_dims)
    return tensor.reshape(size, *(1 for _ in range(missing)), *tensor.shape[1:])
