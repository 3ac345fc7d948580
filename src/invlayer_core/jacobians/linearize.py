"""F at (y*, θ) with its derivatives: the blocks ∂F/∂y, the pullback to θ and the pushforward from θ.

Two ways to the same numbers. Outside ``torch.func`` one recorded evaluation of F serves everything,
through ``autograd.grad``. Inside a ``torch.func`` transform the wrapped tensors need ``torch.func.vjp``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.jacobians.blocks import batched_rows

__all__ = ["Linearization", "Pullback", "linearize", "push_by_forward_mode"]


class Linearization(ABC):
    """F and its first derivatives at one point; every result is differentiable if asked for."""

    system: System
    y: Tensor
    theta: Sequence[Tensor]
    value: Tensor
    differentiable: bool  # whether results can themselves be differentiated by plain autograd

    @abstractmethod
    def rows(self, cotangents: Tensor) -> Tensor:
        """``cotangents`` ``(k, *residual)`` pulled back to y: ``(k, *batch, *event)``."""

    @abstractmethod
    def columns(self, tangents: Tensor) -> Tensor:
        """``(∂F/∂y) tangents``, ``(k, *batch, *event) -> (k, *residual)``."""

    @abstractmethod
    def pull_y(self, cotangent: Tensor) -> Tensor:
        """``(∂F/∂y)ᵀ cotangent``, ``(B, m) -> (B, n)``; not differentiable."""

    @abstractmethod
    def push_y(self, tangent: Tensor) -> Tensor:
        """``(∂F/∂y) tangent``, ``(B, n) -> (B, m)``; not differentiable."""

    @abstractmethod
    def pullback(self, cotangent: Tensor, wanted: Sequence[bool], *, check: bool = True) -> Pullback:
        """``(∂F/∂θ)ᵀ cotangent`` for every θ that is wanted, and with ``check`` that of y beside it."""

    @abstractmethod
    def pushforward(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """``(∂F/∂θ) tangents``, in the shape of the residual."""


@final
class Pullback(NamedTuple):
    """One cotangent of F pulled back: to θ (None where not wanted) and, as a check, to y."""

    theta: tuple[Tensor | None, ...]
    y: Tensor | None  # None where the pass was saved


@final
class RecordedLinearization(Linearization):
    """One evaluation of F on the autograd tape.

    With ``create_graph`` the point is an *alias* of (y*, θ): y* depends on θ through this very engine,
    and an alias cuts that path, so that ``autograd.grad`` gives partial derivatives, while derivatives
    of the result still flow through the alias to y* and θ.
    """

    def __init__(
        self, system: System, y: Tensor, theta: Sequence[Tensor], wanted: Sequence[bool], create_graph: bool
    ) -> None:
        self.system = system
        self.create_graph = self.differentiable = create_graph
        with torch.enable_grad():
            self.y = _on_tape(y, create_graph, wanted=True)
            self.theta = [_on_tape(t, create_graph, want) for t, want in zip(theta, wanted, strict=True)]
            self.value = system.residual(self.y, self.theta)
        self._moving = [t for t, want in zip(self.theta, wanted, strict=True) if want]
        self._push: tuple[Tensor, Tensor] | None = None  # the linear map c ↦ (∂F/∂y)ᵀ c, on the tape

    def pull_y(self, cotangent: Tensor) -> Tensor:
        (pulled,) = _functorch.gradients((self.value,), (self.y,), (self._like_value(cotangent),), False)
        pulled = torch.zeros_like(self.y) if pulled is None else pulled
        return pulled.reshape(self.system.shape.count, -1)

    def _like_value(self, cotangent: Tensor) -> Tensor:
        return cotangent.reshape(self.value.shape).to(self.value.dtype)

    def _pushing(self) -> tuple[Tensor, Tensor]:
        """c and (∂F/∂y)ᵀ c, recorded: its derivative by c is ∂F/∂y."""
        if self._push is None:
            with torch.enable_grad():
                cotangent = torch.zeros_like(self.value, requires_grad=True)
                (pulled,) = torch.autograd.grad(
                    self.value, self.y, cotangent, create_graph=True, materialize_grads=True
                )
            self._push = cotangent, pulled
        return self._push

    def columns(self, tangents: Tensor) -> Tensor:
        if not self.value.requires_grad:
            return self.value.new_zeros(tangents.shape[0], *self.value.shape)
        cotangent, pulled = self._pushing()
        with torch.enable_grad():
            return batched_rows(pulled, [cotangent], tangents, self.create_graph)[0]

    def push_y(self, tangent: Tensor) -> Tensor:
        cotangent, pulled = self._pushing()
        (pushed,) = _functorch.gradients((pulled,), (cotangent,), (tangent.reshape(pulled.shape),), False)
        assert pushed is not None
        return pushed.reshape(self.system.shape.count, -1)

    def rows(self, cotangents: Tensor) -> Tensor:
        with torch.enable_grad():
            return batched_rows(self.value, [self.y], cotangents, self.create_graph)[0]

    def pullback(self, cotangent: Tensor, wanted: Sequence[bool], *, check: bool = True) -> Pullback:
        if not self.value.requires_grad:
            return Pullback(_zeros(self.theta, wanted), torch.zeros_like(self.y))
        inputs = [self.y, *self._moving] if check else self._moving
        with torch.enable_grad():
            cotangent = self._like_value(cotangent)
            grads = _functorch.gradients((self.value,), inputs, (cotangent,), self.create_graph)
        if not check:
            return Pullback(_spread(grads, wanted), None)
        pulled = torch.zeros_like(self.y) if grads[0] is None else grads[0]
        return Pullback(_spread(grads[1:], wanted), pulled)

    def pushforward(self, tangents: Sequence[Tensor | None]) -> Tensor:
        # (∂F/∂θ) t is the derivative of the linear map c ↦ (∂F/∂θ)ᵀ c, applied backwards to t: two
        # reverse passes instead of forward mode, which torch does not nest inside a jvp rule.
        with torch.enable_grad():
            cotangent = torch.zeros_like(self.value, requires_grad=True)
            pairs = [(t, d) for t, d in zip(self.theta, tangents, strict=True) if d is not None]
            inputs, given = [t for t, _ in pairs], [d for _, d in pairs]
            if not inputs or not self.value.requires_grad:
                return torch.zeros_like(self.value)
            grads = torch.autograd.grad(
                self.value, inputs, cotangent, create_graph=True, allow_unused=True, materialize_grads=True
            )
            moving = [(g, d) for g, d in zip(grads, given, strict=True) if g.requires_grad]
            if not moving:  # F reads none of them
                return torch.zeros_like(self.value)
            outputs, directions = zip(*moving, strict=True)
            (result,) = torch.autograd.grad(
                outputs, cotangent, directions,
                create_graph=self.create_graph, retain_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        return result


@final
class TransformedLinearization(Linearization):
    """F under ``torch.func``: differentiable, mappable and nestable through ``torch.func.vjp``."""

    def __init__(self, system: System, y: Tensor, theta: Sequence[Tensor]) -> None:
        self.system = system
        self.y, self.theta, self.differentiable = y, tuple(theta), False
        value, pull = torch.func.vjp(lambda point: system.residual(point, self.theta), y)[:2]
        self.value, self._pull_y = value, pull

    def rows(self, cotangents: Tensor) -> Tensor:
        return torch.vmap(lambda cotangent: self._pull_y(cotangent)[0], randomness="different")(cotangents)

    def columns(self, tangents: Tensor) -> Tensor:
        return torch.vmap(
            lambda tangent: push_by_forward_mode(
                lambda point: self.system.residual(point, self.theta), self.y, tangent
            ),
            randomness="different",
        )(tangents)

    def _of_theta(self, *theta: Tensor) -> Tensor:
        return self.system.residual(self.y, theta)

    def pull_y(self, cotangent: Tensor) -> Tensor:
        pulled: Tensor = self._pull_y(cotangent.reshape(self.value.shape))[0]
        return pulled.reshape(self.system.shape.count, -1)

    def push_y(self, tangent: Tensor) -> Tensor:
        pushed = push_by_forward_mode(
            lambda point: self.system.residual(point, self.theta), self.y, tangent.reshape(self.y.shape)
        )
        return pushed.reshape(self.system.shape.count, -1)

    def pullback(self, cotangent: Tensor, wanted: Sequence[bool], *, check: bool = True) -> Pullback:
        kept = [i for i, want in enumerate(wanted) if want]
        cotangent = cotangent.reshape(self.value.shape).to(self.value.dtype)
        grads = self._pull_theta(kept)(cotangent)
        return Pullback(_spread(grads, wanted), self._pull_y(cotangent)[0] if check else None)

    def _partial(self, kept: Sequence[int]) -> Callable[..., Tensor]:
        """F as a function of some of θ alone."""

        def partial(*moving: Tensor) -> Tensor:
            theta = list(self.theta)
            for i, tensor in zip(kept, moving, strict=True):
                theta[i] = tensor
            return self.system.residual(self.y, theta)

        return partial

    def _pull_theta(self, kept: Sequence[int]) -> Callable[[Tensor], Any]:
        pull: Callable[[Tensor], Any] = torch.func.vjp(self._partial(kept), *(self.theta[i] for i in kept))[1]
        return pull

    def pushforward(self, tangents: Sequence[Tensor | None]) -> Tensor:
        kept = [i for i, tangent in enumerate(tangents) if tangent is not None]
        if not kept:
            return torch.zeros_like(self.value)
        partial, given = self._partial(kept), tuple(tangents[i] for i in kept)

        def pulled(cotangent: Tensor) -> tuple[Tensor, ...]:
            result: tuple[Tensor, ...] = torch.func.vjp(partial, *(self.theta[i] for i in kept))[1](cotangent)
            return result

        (result,) = torch.func.vjp(pulled, torch.zeros_like(self.value))[1](given)
        return result


def push_by_forward_mode(function: Callable[[Tensor], Tensor], point: Tensor, tangent: Tensor) -> Tensor:
    """The Jacobian of ``function`` at ``point`` times ``tangent``, under ``torch.func``."""
    pushed: Tensor = torch.func.jvp(function, (point,), (tangent,))[1]
    return pushed


def _spread(grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    supply = iter(grads)
    return tuple(next(supply) if want else None for want in wanted)


def _zeros(theta: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(torch.zeros_like(t) if want else None for t, want in zip(theta, wanted, strict=True))


def _on_tape(tensor: Tensor, create_graph: bool, wanted: bool) -> Tensor:
    if create_graph and (tensor.requires_grad or _functorch.has_tangent(tensor)):
        alias = tensor.view_as(tensor)
        return alias.requires_grad_() if wanted and not alias.requires_grad else alias
    return tensor.detach().requires_grad_() if wanted else tensor.detach()


def linearize(
    system: System,
    y: Tensor,
    theta: Sequence[Tensor],
    wanted: Sequence[bool] | None = None,
    *,
    create_graph: bool = False,
) -> Linearization:
    """F and its derivatives at ``(y, theta)``.

    Parameters
    ----------
    system : System
    y : Tensor of shape ``(*batch, *event)``
    theta : sequence of Tensor
    wanted : sequence of bool, optional
        Which of θ will be asked for by ``pullback`` or ``pushforward``; none by default.
    create_graph : bool
        Whether results are themselves differentiable with respect to y and θ.
    """
    if _functorch.is_active():
        return TransformedLinearization(system, y, theta)
    wanted = [False] * len(theta) if wanted is None else wanted
    return RecordedLinearization(system, y, theta, wanted, create_graph)
