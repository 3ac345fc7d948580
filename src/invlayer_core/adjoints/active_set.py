"""The implicit adjoint of quadratic programs, on the constraints that are active.

Where every constraint is either strictly active or strictly inactive, the active ones stay the same nearby,
and z = (x, μ) solves a linear system with a symmetric matrix (see ``linear/saddle_point.py``):

    K(P, A, G) z = r(q, b, h, lb, ub)

Hence every derivative of a quadratic program is one of a linear solve, r̄ = w and K̄ = −w zᵀ with K w = z̄,
whose own derivative is of the same form (Amos & Kolter, OptNet, ICML 2017, equations 6 to 8, without their
division by multipliers). z is known already from the solver: nothing is factorised before it is
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.adjoint import Adjoint
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.conditions.quadratic import MATRICES, QuadraticConditions, QuadraticLayout
from invlayer_core.conditions.system import System
from invlayer_core.errors import SingularJacobianError, UnsupportedTransformError
from invlayer_core.linear.factor_bank import FactorBank
from invlayer_core.linear.lu import solve_recorded
from invlayer_core.linear.saddle_bank import SaddleBank
from invlayer_core.solvers.iterations import Iterations
from invlayer_core.structure import SystemShape

__all__ = ["ActiveSet"]


@final
@dataclass(frozen=True)
class ActiveSet(Adjoint):
    """Exact derivatives of every order of a quadratic program, on its active set.

    Attributes
    ----------
    settings : Implicit
        What a sample gives whose system is singular: the fields ``singular`` and ``damping``.
    bank : SaddleBank
        Factors that the forward may have left.
    """

    settings: Implicit = field(default_factory=lambda: Implicit(singular="consistent"))
    bank: SaddleBank = field(default_factory=SaddleBank)

    def attach(
        self,
        system: System,
        y: Tensor,
        dead: Tensor | None,
        dead_value: float,
        factors: FactorBank | None = None,
        iterations: Iterations | None = None,
        resolve: Callable[[System, Tensor], Tensor] | None = None,
    ) -> Tensor:
        assert isinstance(system.function, QuadraticConditions)
        layout = system.function.layout
        program = layout.program(system.theta)
        rhs = program.right_hand_side(y)
        active = active_constraints(layout, y)
        matrices = [program.tensors.get(name) for name in MATRICES]
        if _functorch.forward_mode_depth() >= 2:
            if dead is not None:
                raise UnsupportedTransformError(_NESTED_WITH_FAILURES)
            return _recorded(layout, y, active, dead, matrices, rhs, dead_value)
        bank = SaddleBank() if _functorch.is_active() else self.bank
        if bank.active is not None and torch.equal(bank.active, active):
            active = bank.active  # the very one that the factors in the bank were made for
        rule = SaddleRule(layout, self.settings, dead_value, bank)
        result: Tensor = _functorch.apply(_SaddlePoint, rule, y, active, dead, *matrices, rhs)
        return result

    def describe(self, shape: SystemShape, dtype: torch.dtype) -> str:
        return "active set: Schur complement by Cholesky, minimum norm where singular"


_NESTED_WITH_FAILURES = (
    "nested forward mode (jacfwd of jacfwd) over a batch of quadratic programs with failed samples is not "
    "defined; accepted is on_failure='raise', or reverse mode on the outside (jacfwd of jacrev)."
)


def active_constraints(layout: QuadraticLayout, z: Tensor) -> Tensor:
    """Rows of A, and what has a positive multiplier: the forward leaves zero for the others."""
    multipliers = z.detach()[..., layout.size :]
    equality = torch.arange(multipliers.shape[-1], device=z.device) < layout.equalities
    return (multipliers > 0) | equality


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
class _SaddlePoint(torch.autograd.Function):
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
        z = _sparing(z, dead)
        wanted = ctx.needs_input_grad[4:7]
        bars = [
            _matrix_bar(ctx.rule.layout, name, held, w, z) if want else None
            for name, held, want in zip(MATRICES, matrices, wanted, strict=True)
        ]
        return None, None, None, None, *bars, w

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, active, dead, *matrices = _functorch.revive(ctx.saved_tensors)
        *dots, rhs = tangents[4:]
        z = _sparing(z, dead)
        change = _moved(ctx.rule.layout, dots, z)
        if rhs is None:
            rhs = torch.zeros_like(z)
        rhs = rhs if change is None else rhs - change
        result: Tensor = _SaddlePoint.apply(ctx.rule, None, active, dead, *matrices, rhs)
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
            return _SaddlePoint.apply(rule, mapped[0], active, dead, P, G, A, mapped[1]), 0
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
        return _SaddlePoint.apply(rule, known, active, dead, *matrices, rhs), extra


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
        w: Tensor = _SaddlePoint.apply(rule, None, active, dead, *matrices, rhs)
        return w
    if torch.is_grad_enabled() and (recorded or rhs.requires_grad):
        # This kind of mapping drops the graph inside a custom Function without a word.
        return _recorded(rule.layout, rhs, active, dead, matrices, rhs, rule.dead_value)
    levels = _functorch.levels_mapped_by_autograd(rhs)
    return _functorch.map_again(rule.solve(active, dead, matrices, _functorch.plain(rhs)), levels)


def _with_batch_dim(tensor: Tensor, dim: int | None, size: int, batch: int, event_dims: int) -> Tensor:
    """A matrix with the mapped dimension in front of the batch dims, where it is one more of them."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    missing = batch - (tensor.ndim - 1 - event_dims)
    return tensor.reshape(size, *(1 for _ in range(missing)), *tensor.shape[1:])


def _sparing(z: Tensor, dead: Tensor | None) -> Tensor:
    """z without the values of failed samples, which may be NaN."""
    return z if dead is None else torch.where(dead.unsqueeze(-1), torch.zeros_like(z), z)


def _matrix_bar(layout: QuadraticLayout, name: str, held: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """The cotangent of P, G or A: −w zᵀ, where and as often as the matrix stands in K."""
    form, n = layout.forms[name], layout.size
    if name == "P":
        left = torch.stack([w[..., :n], z[..., :n]], -1)
        return form.outer(-0.5 * left, left.flip(-1), held)
    first = n if name == "A" else n + layout.equalities
    rows = slice(first, first + form.rows)
    left = torch.stack([w[..., rows], z[..., rows]], -1)
    right = torch.stack([z[..., :n], w[..., :n]], -1)
    return form.outer(-left, right, held)


def _moved(layout: QuadraticLayout, dots: Sequence[Tensor | None], z: Tensor) -> Tensor | None:
    """K̇ z for tangents of P, G and A; None if there are none."""
    given = {name: dot for name, dot in zip(MATRICES, dots, strict=True) if dot is not None}
    if not given:
        return None
    x, (a, g, *bounds) = z[..., : layout.size], z[..., layout.size :].split(layout.sections[1:], -1)
    moved = torch.zeros_like(x)
    if (dot := given.get("P")) is not None:
        form = layout.forms["P"]
        moved = moved + 0.5 * (form.multiply(dot, x) + form.multiply_transposed(dot, x))
    parts = []
    for name, multipliers in (("A", a), ("G", g)):
        if (dot := given.get(name)) is None:
            parts.append(torch.zeros_like(multipliers))
            continue
        moved = moved + layout.forms[name].multiply_transposed(dot, multipliers)
        parts.append(layout.forms[name].multiply(dot, x))
    return torch.cat([moved, *parts, *map(torch.zeros_like, bounds)], -1)


def _recorded(
    layout: QuadraticLayout,
    like: Tensor,
    active: Tensor,
    dead: Tensor | None,
    matrices: Sequence[Tensor | None],
    rhs: Tensor,
    dead_value: float,
) -> Tensor:
    """K⁻¹ rhs in operations that torch differentiates itself, for nested forward mode: see ``Implicit``."""
    n, batch = layout.size, active.shape[:-1]
    P, G, A = (
        None if held is None else layout.forms[name].dense(held).expand(*batch, -1, -1)
        for name, held in zip(MATRICES, matrices, strict=True)
    )
    eye = torch.eye(n, dtype=like.dtype, device=like.device).expand(*batch, -1, -1)
    bounds = [sign * eye for name, sign in (("lb", -1.0), ("ub", 1.0)) if name in layout.names]
    K = 0.0 * eye if P is None else 0.5 * (P + P.mT)
    rows = [m for m in (A, G, *bounds) if m is not None]
    if rows:
        mask = active.to(like.dtype)
        C = torch.cat(rows, -2) * mask.unsqueeze(-1)
        K = torch.cat([torch.cat([K, C.mT], -1), torch.cat([C, torch.diag_embed(1.0 - mask)], -1)], -2)
        rhs = torch.cat([rhs[..., :n], rhs[..., n:] * mask], -1)
    if dead is None:
        return solve_recorded(K, rhs)
    whole = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    w = solve_recorded(torch.where(dead[..., None, None], whole, K), _sparing(rhs, dead))
    answer = torch.where((rhs != 0).any(-1, keepdim=True), dead_value, 0.0).to(w.dtype)
    return torch.where(dead.unsqueeze(-1), answer, w)
