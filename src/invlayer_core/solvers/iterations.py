"""Solvers whose iterations autograd can record, for the adjoints that differentiate through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.solvers.contract import Solver

if TYPE_CHECKING:
    from invlayer_core.conditions.system import System

__all__ = ["DifferentiableSolver", "Iterations", "any_sample", "may_have", "surely_all"]


class DifferentiableSolver(Solver):
    """A batched solver written in differentiable torch from the first iteration to the last.

    What its problem gives may hang on the graph, and so does then what ``solve`` returns: no ``detach``,
    no change in place of what was recorded. Which way an iteration goes (masks, step lengths by halving)
    counts as constant. Under ``torch.vmap`` a mask cannot be asked; :func:`any_sample` can.
    """

    batched = True

    @abstractmethod
    def iterate(self, problem: Any, y0: Tensor, options: Mapping[str, Any], steps: int) -> Tensor:
        """Exactly ``steps`` iterations of every sample from ``y0`` ``(B, n)``, which may have converged."""


class Iterations(ABC):
    """The iterations of the forward solver on F(·, θ), as an adjoint may ask for them.

    Attributes
    ----------
    start : Tensor of shape ``(*batch, *event)``
        The initial guess.
    recorded : Tensor of shape ``(*batch, *event)`` or None
        y* on the graph, where the solve itself was recorded.
    """

    recorded: Tensor | None

    @property
    @abstractmethod
    def start(self) -> Tensor:
        """y0."""

    @abstractmethod
    def with_recorded(self, recorded: Tensor | None) -> Iterations:
        """The same, with what the solve has recorded."""

    @abstractmethod
    def whole(self, system: System, start: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """The solve once more, recorded."""

    @abstractmethod
    def last(self, system: System, y: Tensor, theta: Sequence[Tensor], steps: int) -> Tensor:
        """``steps`` iterations from ``y``, recorded."""


def any_sample(mask: Tensor) -> bool:
    """Whether a mask over samples holds anywhere: one question to the host, under any transform.

    Examples
    --------
    >>> import torch
    >>> any_sample(torch.tensor([False, True]))
    True
    """
    if not _functorch.is_active():
        return bool(mask.any())
    return bool(_functorch.plain(mask).any())


def surely_all(mask: Tensor) -> bool:
    """Whether a mask holds for every sample, on the CPU; on an accelerator False without asking."""
    if mask.device.type != "cpu":
        return False
    return bool(_functorch.plain(mask).all()) if _functorch.is_active() else bool(mask.all())


def may_have(mask: Tensor) -> bool:
    """As :func:`any_sample` on the CPU; on an accelerator True without asking, which would make it wait."""
    return mask.device.type != "cpu" or any_sample(mask)
