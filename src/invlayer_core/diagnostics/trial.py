"""One layer at one point, called once: what every check starts from, and its derivatives by autograd."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from invlayer_core.certificate import SolveInfo
from invlayer_core.diagnostics.directions import Directions
from invlayer_core.diagnostics.layout import Layout
from invlayer_core.diagnostics.subject import Outputs, Subject, flatten
from invlayer_core.diagnostics.systems import SystemFacts, examine_systems, leaves_behind

__all__ = ["Trial", "first_line", "inner"]


@final
@dataclass(frozen=True)
class Trial:
    """A subject with the facts of its first call.

    Attributes
    ----------
    subject : Subject
    which : tuple of int
        The outputs that are checked: those that carry a gradient, or all if none does.
    carries : bool
        Whether any output carries a gradient.
    left_out : int
        Outputs that carry none beside others that do.
    strangers : tuple of Tensor
        Leaves that require grad, influence the output, and are not among the inputs.
    value : Tensor of shape ``(N,)``
        The flat output.
    layout : Layout
    directions : Directions
    systems : tuple of SystemFacts
    info : SolveInfo or None
    eps : float
        Unit of the coarsest precision that takes part.
    """

    subject: Subject
    which: tuple[int, ...]
    carries: bool
    left_out: int
    strangers: tuple[Tensor, ...]
    value: Tensor
    layout: Layout
    directions: Directions
    systems: tuple[SystemFacts, ...]
    info: SolveInfo | None
    eps: float

    @classmethod
    def start(cls, subject: Subject) -> Trial:
        """Call the layer once, on the tape."""
        return subject.record(subject.values, lambda outputs, leaves: _read(subject, outputs, leaves))

    @property
    def condition(self) -> float:
        """The largest condition number of an equilibrated J behind the output; 1 if none is known."""
        known = [float(facts.equilibrated.max()) for facts in self.systems if facts.equilibrated is not None]
        return max([1.0, *known])

    @property
    def solver_error(self) -> float:
        """The largest relative distance of a solution from its root, by one Newton step."""
        known = [float(facts.error.max()) for facts in self.systems if facts.error is not None]
        return max([0.0, *known])

    @property
    def accurate(self) -> float:
        """Up to here a relative error of y is small: 10 √eps, 1.5e-7 in float64 and 3e-3 in float32."""
        return 10.0 * self.eps**0.5

    def close(self, order: int) -> float:
        """Up to here a relative error of a derivative is small: 5e-7 in float64, and 2e-5 of a second one."""
        return self.eps ** (0.5 - 0.1 * order)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """The flat output."""
        return self.subject.forward(tensors, self.which)

    def forward_along(self, tangent: Sequence[Tensor], step: float) -> Tensor:
        """The flat output, ``step`` along a direction."""
        return self.forward(self.subject.moved(tangent, step))

    def pullbacks(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[list[Tensor]]:
        """Jᵀw for every flat cotangent w: one list per cotangent, shaped like the inputs."""

        def pull(outputs: Outputs, leaves: list[Tensor]) -> list[list[Tensor]]:
            return [pull_back(self.select(outputs), leaves, w, create_graph=False) for w in cotangents]

        return self.subject.record(tensors, pull)

    def pushforward(self, tangent: Sequence[Tensor]) -> Tensor:
        """J v as a flat vector, by forward mode."""

        def push(outputs: Outputs) -> Tensor:
            pairs = [(out, forward_ad.unpack_dual(out).tangent) for out in self.select(outputs)]
            return flatten([torch.zeros_like(out) if moved is None else moved for out, moved in pairs])

        with forward_ad.dual_level(), _without_jit_warning():
            pairs = zip(self.subject.values, tangent, strict=True)
            return self.subject.call([forward_ad.make_dual(value.clone(), t) for value, t in pairs], push)

    def select(self, outputs: Outputs) -> list[Tensor]:
        """The outputs that are checked."""
        return [outputs.tensors[i] for i in self.which]


def _read(subject: Subject, outputs: Outputs, leaves: list[Tensor]) -> Trial:
    tensors = outputs.tensors
    with_gradient = tuple(i for i, tensor in enumerate(tensors) if tensor.requires_grad)
    which = with_gradient or tuple(range(len(tensors)))
    chosen = [tensors[i] for i in which]
    own = {id(leaf) for leaf in leaves}
    strangers = tuple(leaf for leaf in leaves_behind(chosen) if id(leaf) not in own)
    systems = tuple(examine_systems(chosen))
    layout = Layout.read(
        systems[0].batch if systems else None, chosen, subject.values[: subject.argument_count]
    )
    value = outputs.flat(which)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in [*chosen, *leaves])
    directions = Directions.draw(subject.values, value.numel())
    left_out = len(tensors) - len(which)
    return Trial(
        subject, which, bool(with_gradient), left_out, strangers, value, layout, directions, systems,
        outputs.info, eps,
    )  # fmt: skip


def pull_back(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool
) -> list[Tensor]:
    """Jᵀw for one flat cotangent; zeros for leaves that the outputs do not depend on."""
    parts = cotangent.split([output.numel() for output in outputs])
    shaped = [part.reshape(output.shape).to(output) for part, output in zip(parts, outputs, strict=True)]
    grads = torch.autograd.grad(
        outputs, leaves, shaped, allow_unused=True, retain_graph=True, create_graph=create_graph
    )
    return [
        torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)
    ]


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """⟨one, other⟩ in float64, and its size, free of cancellation."""
    products = flatten(one) * flatten(other)
    return float(products.sum()), float(products.norm())


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first sentence of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:2])[:240]}" if lines else type(error).__name__


@contextmanager
def _without_jit_warning() -> Iterator[None]:
    """torch compiles its forward-mode rules by torch.jit.script, which it has itself deprecated (2.13)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", DeprecationWarning)
        yield
