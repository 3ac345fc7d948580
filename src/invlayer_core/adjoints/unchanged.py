"""Whether F is, when derivatives are taken, what it was when its solution was certified.

F is evaluated anew at (y*, θ) for its derivatives. Torch guards what it has saved itself against being
overwritten; but F may read more than its args: a buffer, an attribute, a random number. Its value, which
comes with the derivatives at no cost, tells whether that has changed.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.certificate import nudged
from invlayer_core.errors import ConditionsError
from invlayer_core.jacobians.linearize import Linearization

__all__ = ["Certified", "refuse_changed", "shift"]


@final
class Certified(NamedTuple):
    """F(y*, θ) as it was measured, ``(*batch, m)``, and the ``atol`` that it was measured by."""

    residual: Tensor
    atol: float


def shift(linearization: Linearization, certified: Certified | None) -> Tensor | None:
    """F now less F as it was certified, ``(B, m)``; None where they are not to be compared."""
    value, count = linearization.value, linearization.system.shape.count
    if certified is None or value.numel() != certified.residual.numel() or _functorch.is_active():
        return None
    return value.detach().reshape(count, -1) - certified.residual.reshape(count, -1)


@torch.no_grad()
def refuse_changed(linearization: Linearization, certified: Certified | None, dead: Tensor | None) -> None:
    """Raise if F of a sample has changed by more than ``atol``, and than a small change of y explains.

    Raises
    ------
    ConditionsError
    """
    moved = shift(linearization, certified)
    if certified is None or moved is None or not moved.numel():
        return
    size = moved.abs().amax(-1)
    bad = size > certified.atol  # False for NaN: nothing was certified there
    if dead is not None:
        bad = bad & ~dead.reshape(-1)
    if not bool(bad.any()):
        return
    bad = bad & (size > _explained(linearization))
    if bool(bad.any()):
        raise _changed(int(bad.nonzero()[0]), linearization, moved)


def _explained(linearization: Linearization) -> Tensor:
    """How much F changes with y by a millionth, ``(B,)``: rounding errors of large terms are less.

    By its derivative, and not by evaluating it beside y: what rolls dice would explain anything.
    """
    flat = linearization.y.detach().reshape(linearization.system.shape.count, -1)
    return linearization.push_y(nudged(flat, None) - flat).detach().abs().amax(-1)


def _changed(sample: int, linearization: Linearization, moved: Tensor) -> ConditionsError:
    function = linearization.system.function
    name = getattr(function, "__qualname__", type(function).__name__)
    return ConditionsError(
        f"the conditions {name!r} are not what they were when the solution was certified: at the same y and "
        f"args, F of sample {sample} has changed by {float(moved[sample].abs().max()):.2g}. Something that "
        "they read has been overwritten before the backward, or they roll dice (dropout in training). "
        "Accepted are conditions that give the same value whenever they are asked: hand what changes over "
        "through args=, or clone it."
    )
