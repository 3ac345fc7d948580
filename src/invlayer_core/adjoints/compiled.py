"""The reverse rule as one compiled function (``compile=True``).

Conditions, Jacobian blocks, linear solve, pullback and their certificate go through ``torch.compile`` as one.
The graph says whether all is well; where it is not (a singular Jacobian, mixed samples, an inaccurate
solve), and for every derivative but the first in reverse mode, the ordinary rule takes over.

A compiled function is kept for each conditions object, and goes when that goes. Each has a code object of its
own, since that is what Dynamo caches by: conditions do not compete for one list of guards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.fixed_point import FixedPointConditions
from invlayer_core.conditions.inverse import InverseConditions
from invlayer_core.conditions.structured import StructuredConditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import PerformanceWarning, warn_user
from invlayer_core.jacobians.blocks import cotangent_basis
from invlayer_core.linear.methods import LU
from invlayer_core.linear.singular import is_suspicious

if TYPE_CHECKING:
    from invlayer_core.adjoints.implicit import Implicit

__all__ = ["pull_back_compiled"]

_LARGE = 150  # unknowns, from which on the factorisation needs care (and compiling gains nothing)

_Form = Literal["plain", "fixed_point", "inverse"]


def pull_back_compiled(
    settings: Implicit,
    system: System,
    y: Tensor,
    theta: Sequence[Tensor],
    cotangent: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...] | None:
    """θ̄ by the compiled rule; None where the ordinary rule has to be asked."""
    if torch.is_grad_enabled() or _functorch.is_active() or _functorch.in_forward_mode():
        return None
    if _functorch.is_mapped_by_autograd(cotangent) or system.has_moved:
        return None
    form, function = _form_of(system.function)
    rule = _rule_for(function)
    if rule is None or rule.failed:
        return None
    reason = _why_not(settings, system, y, function)
    if reason is not None:
        rule.give_up(reason)
        return None
    return rule.run(form, function, system, y, theta, cotangent, wanted)


@final
@dataclass(eq=False)
class _CompiledRule:
    """One compiled function, or the knowledge that it cannot be had."""

    compiled: Callable[..., Any]
    failed: bool = False

    def run(
        self,
        form: _Form,
        function: Any,
        system: System,
        y: Tensor,
        theta: Sequence[Tensor],
        cotangent: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...] | None:
        names = _names_of(function, system.captured)
        tensors = [tensor.detach() for tensor in theta]
        try:
            holds, pulled = self.compiled(
                form, function, system.jacobian, names, len(system.shape.batch), y.detach(), tensors,
                cotangent.detach(), tuple(wanted),
            )  # fmt: skip
        except Exception as error:
            self.give_up(f"torch.compile failed with {type(error).__name__}: {_first_line(error)}")
            return None
        if not bool(holds):
            return None
        supply = iter(pulled)
        return tuple(next(supply) if want else None for want in wanted)

    def give_up(self, reason: str) -> None:
        self.failed = True
        warn_user(
            f"compile=True: {reason}. Derivatives of these conditions are taken without it, and the numbers "
            "are the same. Accepted are conditions that torch.compile takes in one graph; leave "
            "compile=False for others.",
            PerformanceWarning,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _form_of(conditions: Any) -> tuple[_Form, Any]:
    """What the kind has made of the user's function, and that function."""
    if isinstance(conditions, FixedPointConditions):
        return "fixed_point", conditions.function
    if isinstance(conditions, InverseConditions):
        return "inverse", conditions.function
    if isinstance(conditions, StructuredConditions):  # not compiled; the user's has the one warning
        return "plain", conditions.function
    return "plain", conditions


_RULES: weakref.WeakKeyDictionary[Any, dict[str, _CompiledRule]] = weakref.WeakKeyDictionary()


def _rule_for(function: Any) -> _CompiledRule | None:
    owner, name = function, ""
    if isinstance(function, MethodType):  # made anew at each access; its object stays
        owner, name = function.__self__, function.__name__
    try:
        rules = _RULES.setdefault(owner, {})
    except TypeError:  # neither hashable nor weakly referable
        return None
    if name not in rules:
        rules[name] = _CompiledRule(torch.compile(_own_copy(_reverse_rule), fullgraph=True))
    return rules[name]


def _own_copy(function: Any) -> Callable[..., Any]:
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _why_not(settings: Implicit, system: System, y: Tensor, function: Any) -> str | None:
    if not isinstance(settings.method(system.shape, y.dtype), LU):
        return "it solves by LU, and another linear solver was asked for"
    if system.shape.size >= _LARGE:
        return f"it is for systems of fewer than {_LARGE} unknowns, and this one has {system.shape.size}"
    if isinstance(system.function, StructuredConditions):
        return "it is for one real tensor of unknowns, and these are a pytree or complex"
    if system.chunk_size is not None:
        return "it takes all rows of the Jacobian at once, and chunk_size= was given"
    if any(tensor.is_complex() for tensor in system.theta):
        return "args are complex"
    if not system.arguments.are_tensors:
        return "args are not plain tensors"
    if system.captured and _names_of(function, system.captured) is None:
        return "the conditions capture tensors that are not parameters of the nn.Module that they are"
    return None


def _names_of(function: Any, captured: Sequence[Tensor]) -> tuple[str, ...] | None:
    """Under which names the module ``function`` has the captured tensors."""
    if not captured:
        return ()
    if not isinstance(function, torch.nn.Module):
        return None
    names = {id(parameter): name for name, parameter in function.named_parameters()}
    if not all(id(tensor) in names for tensor in captured):
        return None
    return tuple(names[id(tensor)] for tensor in captured)


def _reverse_rule(
    form: _Form,
    function: Any,
    jacobian: Callable[..., Tensor] | None,
    names: tuple[str, ...],
    batch_dims: int,
    y: Tensor,
    theta: list[Tensor],
    cotangent: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor]]:
    """θ̄ = −(∂F/∂θ)ᵀ J⁻ᵀ ȳ, and whether it may be trusted. Read by Dynamo as a whole."""
    plain = len(theta) - len(names)

    def residual(y: Tensor, moving: list[Tensor]) -> Tensor:
        supply = iter(moving)
        tensors = [next(supply) if want else t for t, want in zip(theta, wanted, strict=True)]
        args = tuple(tensors[:plain])
        if form == "inverse":
            return _call(function, names, tensors[plain:], (y,)) - args[0]
        value = _call(function, names, tensors[plain:], (y, *args))
        return value - y if form == "fixed_point" else value

    moving = [t for t, want in zip(theta, wanted, strict=True) if want]
    value, pull = torch.func.vjp(residual, y, moving)[:2]
    batch = y.shape[:batch_dims]
    count, n, m = batch.numel(), y.shape[batch_dims:].numel(), value.shape[batch_dims:].numel()
    rhs = cotangent.reshape(count, n)
    if jacobian is None:
        blocks = _blocks(pull, value, batch, n)
    else:
        blocks = jacobian(y, *theta[:plain]).reshape(count, m, n)
    factors, pivots = torch.linalg.lu_factor_ex(blocks)[:2]
    weights = torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1), adjoint=True).squeeze(-1)
    back, pulled = pull(-weights.reshape(value.shape).to(value.dtype))
    gap = (back.reshape(count, n) + rhs).abs().amax(-1)
    accurate = gap <= torch.finfo(rhs.dtype).eps ** 0.6 * rhs.abs().amax(-1)
    return (accurate & ~is_suspicious(weights, rhs)).all(), pulled


def _call(function: Any, names: tuple[str, ...], parameters: list[Tensor], args: tuple[Any, ...]) -> Tensor:
    if not names:
        return function(*args)
    return torch.func.functional_call(function, dict(zip(names, parameters, strict=True)), args)


def _blocks(pull: Callable[[Tensor], Any], value: Tensor, batch: torch.Size, n: int) -> Tensor:
    """∂F/∂y of every sample, the samples weighed by powers of two: see ``per_sample_blocks``."""
    count = batch.numel()
    basis = cotangent_basis(value.shape, batch, value)
    weights = 2.0 ** (torch.arange(count, dtype=value.dtype, device=value.device) % 3)
    events = (1,) * (value.ndim - len(batch))
    rows = torch.vmap(lambda cotangent: pull(cotangent)[0])(basis * weights.reshape(*batch, *events))
    blocks = rows.reshape(rows.shape[0], count, n).movedim(0, 1)
    return blocks / weights.reshape(-1, 1, 1)
