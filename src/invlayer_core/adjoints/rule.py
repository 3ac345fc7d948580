"""The two rules of the implicit function theorem, at a point (y*, θ).

reverse:  Jᵀ w = ȳ,   θ̄ = −(∂F/∂θ)ᵀ w
forward:  J ẏ = −(∂F/∂θ) θ̇
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.adjoint import Solved
from invlayer_core.adjoints.at_once import allowed_gap, is_plain, largest, pull_at_once
from invlayer_core.adjoints.compiled import pull_back_compiled
from invlayer_core.adjoints.failed import out_of_harm
from invlayer_core.adjoints.recorded import answer_for_failed
from invlayer_core.adjoints.sparse import (
    SharedSparseLU,
    pull_by_known_factors,
    solve_by_sparse_factors,
)
from invlayer_core.adjoints.unchanged import Certified, refuse_changed
from invlayer_core.conditions.stationarity import StationarityConditions
from invlayer_core.conditions.system import System
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.linear.factor_bank import FactorBank
from invlayer_core.linear.iterative import Krylov
from invlayer_core.linear.matrix_free import LinearResidual, solve_matrix_free
from invlayer_core.linear.methods import LinearSolver, Lstsq
from invlayer_core.linear.refine import explain_inaccurate, refine
from invlayer_core.linear.singular import Diagnosis, diagnose
from invlayer_core.linear.solve import SolveRequest, solve_blocks
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.structure import Arguments, SystemShape

if TYPE_CHECKING:
    from invlayer_core.adjoints.implicit import Implicit

__all__ = ["ImplicitRule"]


@final
@dataclass(frozen=True)
class ImplicitRule:
    """The two derivative rules, at a point (y*, θ) given by torch."""

    settings: Implicit
    system: System
    dead_value: float
    factors: FactorBank = field(default_factory=FactorBank)  # of a sparse J, for every cotangent
    certified: Certified | None = None  # F(y*, θ), to see that F is still the same

    def pullback(
        self,
        y: Tensor,
        dead: Tensor | None,
        theta: Sequence[Tensor],
        cotangent: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        if y.numel() == 0:  # zeros that hang on the graph, so that they can be differentiated again
            empty = y.sum() + cotangent.sum()
            return tuple(None if t is None else t + empty for t in _everywhere(0.0, theta, wanted))
        if dead is not None and bool(_functorch.plain(dead).all()):
            unasked = bool((_functorch.plain(cotangent) == 0).all())
            return _everywhere(0.0 if unasked else self.dead_value, theta, wanted)
        if self.system.compile and dead is None:
            pulled = pull_back_compiled(self.settings, self.system, y, theta, cotangent, wanted)
            if pulled is not None:
                return pulled
        linearization = self._linearize(y, dead, theta, wanted, [cotangent])
        flat = cotangent.reshape(self.system.shape.count, self.system.shape.size)
        method = self.settings.method(self.system.shape, y.dtype)
        if not method.needs_blocks:
            refuse_changed(linearization, self.certified, dead)
            if isinstance(method, SparseLU) and dead is None and is_plain(flat):
                pulled = pull_by_known_factors(linearization, self.factors, flat, wanted)
                if pulled is not None:
                    return pulled
            weights = self._solve_without_blocks(linearization, method, flat, dead, transpose=True)
            return linearization.pullback(-weights, wanted, check=False).theta
        if dead is None and self.settings.singular != "consistent":
            at_once = pull_at_once(linearization, flat, wanted, method, self.certified)
            if at_once is not None:
                return at_once
        return self._pull_with_care(linearization, flat, dead, wanted)

    def _pull_with_care(
        self, linearization: Linearization, flat: Tensor, dead: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Every case: derivatives of the result, mapped tensors, failed and singular samples, lost digits."""
        refuse_changed(linearization, self.certified, dead)
        blocks = per_sample_blocks(linearization, uneven=True)
        weights, decided, rhs = self._solve(linearization, blocks, flat, dead, transpose=True)
        found = linearization.pullback(-weights, wanted)
        back = (blocks.mT @ -weights.unsqueeze(-1)) if found.y is None else found.y
        if self._holds(back, rhs, decided):
            return found.theta
        explain_inaccurate(linearization, blocks)
        weights = refine(blocks, weights, rhs)
        return linearization.pullback(-weights, wanted).theta

    def _holds(self, pulled: Tensor, rhs: Tensor, decided: Tensor | None) -> bool:
        """Whether Jᵀw = ȳ, with J as F itself pulls back: it certifies the blocks and the solve at once."""
        with torch.no_grad():
            gap, size = largest(pulled.reshape(rhs.shape) + rhs), largest(rhs)
            bad = (gap > allowed_gap(rhs.dtype) * size) & size.isfinite()
            if decided is not None:
                bad = bad & ~decided
            return not bool(_functorch.plain(bad).any())

    def pushforward(
        self, y: Tensor, dead: Tensor | None, theta: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> Tensor:
        if y.numel() == 0:
            return torch.zeros_like(y)
        given = [tangent is not None for tangent in tangents]
        linearization = self._linearize(y, dead, theta, given, [t for t in tangents if t is not None])
        moved = linearization.pushforward(tangents).reshape(self.system.shape.count, -1)
        method = self.settings.method(self.system.shape, y.dtype)
        if not method.needs_blocks:
            return -self._solve_without_blocks(linearization, method, moved, dead, transpose=False).reshape(
                y.shape
            )
        blocks = per_sample_blocks(linearization, check=True)
        return -self._solve(linearization, blocks, moved, dead, transpose=False)[0].reshape(y.shape)

    def _linearize(
        self,
        y: Tensor,
        dead: Tensor | None,
        theta: Sequence[Tensor],
        wanted: Sequence[bool],
        directions: Sequence[Tensor],
    ) -> Linearization:
        create_graph = (torch.is_grad_enabled() or _functorch.in_forward_mode()) and any(
            tensor.requires_grad or _functorch.has_tangent(tensor) for tensor in (y, *theta, *directions)
        )
        if dead is not None:
            y, theta = out_of_harm(self.system, y, dead, theta)
        return linearize(self.system, y, theta, wanted, create_graph=create_graph)

    def solve(self, linearization: Linearization, blocks: Tensor, rhs: Tensor) -> Tensor:
        """x with ``blocks x = rhs``, singular samples answered by the policy."""
        return self._solve(linearization, blocks, rhs, None, transpose=False)[0]

    def _solve(
        self,
        linearization: Linearization,
        blocks: Tensor,
        rhs: Tensor,
        dead: Tensor | None,
        *,
        transpose: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, the samples that a policy answered, and the right-hand side that was solved for."""
        exempt = None
        if dead is not None:
            exempt = dead.reshape(-1)
            mask = exempt.unsqueeze(-1)
            identity = torch.eye(*blocks.shape[-2:], dtype=blocks.dtype, device=blocks.device)
            blocks = torch.where(mask.unsqueeze(-1), identity, blocks)
            rhs = torch.where(mask, answer_for_failed(rhs, self.dead_value), rhs)
        request = SolveRequest(
            blocks=blocks,
            rhs=rhs,
            transpose=transpose,
            singular=self.settings.singular,
            damping=self.settings.damping,
            diagnose=lambda: self._diagnose(linearization, blocks.detach()),
            exempt=exempt,
            least_norm=isinstance(self.settings.linear_solver, Lstsq),
        )
        x, singular = solve_blocks(request)
        decided = exempt if singular is None else singular if exempt is None else singular | exempt
        return x, decided, rhs

    def _solve_without_blocks(
        self,
        linearization: Linearization,
        method: LinearSolver,
        rhs: Tensor,
        dead: Tensor | None,
        *,
        transpose: bool,
    ) -> Tensor:
        exempt = None if dead is None else dead.reshape(-1)
        if exempt is not None:
            rhs = torch.where(exempt.unsqueeze(-1), answer_for_failed(rhs, self.dead_value), rhs)
        if isinstance(method, (SparseLU, SharedSparseLU)):
            return solve_by_sparse_factors(
                self.settings, linearization, method, self.factors, rhs, exempt,
                transpose=transpose, attach=self._attach_inner,
            )  # fmt: skip
        assert isinstance(method, Krylov)
        x = solve_matrix_free(linearization, method, rhs, exempt, transpose, self.settings.singular)
        if not (_functorch.is_active() or linearization.differentiable or rhs.requires_grad):
            return x
        # x is itself defined implicitly, by A(y, θ) x = b: the same adjoint differentiates it.
        residual = LinearResidual(self.system, transpose, exempt)
        arguments = Arguments.flatten((rhs, linearization.y, *linearization.theta))
        inner = System(residual, arguments, SystemShape(x.shape[:1], x.shape[1:]))
        return self._attach_inner(method.of_inner_system(self.system, transpose), inner, x)

    def _attach_inner(self, method: LinearSolver, inner: System, x: Tensor) -> Tensor:
        return replace(self.settings, linear_solver=method).attach(Solved(inner, x, dead_value=0.0))

    def _diagnose(self, linearization: Linearization, blocks: Tensor) -> Diagnosis:
        y, theta, shape = (
            linearization.y.detach(),
            [t.detach() for t in linearization.theta],
            self.system.shape,
        )

        def jacobian_at(point: Tensor) -> Tensor:
            moved = linearize(self.system, point.reshape(shape.full), theta)
            return per_sample_blocks(moved).detach()

        flat = y.reshape(shape.count, shape.size)
        residual = self.system.residual(y, theta).detach().reshape(shape.count, -1)
        noise = self._noise(y, theta, blocks)
        return diagnose(blocks, flat, residual, noise, jacobian_at, aligned=not self._is_least_squares)

    @property
    def _is_least_squares(self) -> bool:
        return isinstance(self.system.function, StationarityConditions) and self.system.function.is_squares

    def _noise(self, y: Tensor, theta: Sequence[Tensor], blocks: Tensor) -> Tensor:
        """The rounding error of F(y, θ): a few units in the last place of each term that enters it.

        The sizes of the terms are not visible, but the changes that F undergoes when y and θ are scaled
        are: alternating signs and uneven weights keep terms from cancelling, as they do in F itself.
        """
        floating = [t.is_floating_point() or t.is_complex() for t in theta]
        tangents = [_uneven(t) if real else None for t, real in zip(theta, floating, strict=True)]
        flat = y.reshape(blocks.shape[0], -1)
        of_theta = (
            linearize(self.system, y, theta, floating).pushforward(tangents).reshape(blocks.shape[0], -1)
        )
        of_y = (blocks @ _uneven(flat).unsqueeze(-1)).squeeze(-1)
        eps = 4.0 * torch.finfo(y.dtype).eps
        if self._is_least_squares:
            return eps * (of_theta.detach() + of_y)
        return eps * (of_theta.detach().abs() + of_y.abs())


def _everywhere(value: float, theta: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(torch.full_like(t, value) if want else None for t, want in zip(theta, wanted, strict=True))


def _uneven(tensor: Tensor) -> Tensor:
    steps = torch.arange(tensor.numel(), dtype=tensor.dtype.to_real(), device=tensor.device)
    steps = steps.reshape(tensor.shape)
    return (
        tensor.detach() * (1.0 + 0.3 * torch.sin(steps)) * torch.where(steps % 2 == 0, 1.0, -1.0).to(tensor)
    )
