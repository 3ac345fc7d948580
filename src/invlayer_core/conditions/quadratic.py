"""Quadratic programs, and what their solutions satisfy.

minimise ½ xᵀPx + qᵀx  subject to  A x = b,  G x ≤ h,  lb ≤ x ≤ ub

With the bounds as rows −x ≤ −lb and x ≤ ub, all constraints are C x ≤ d, those of A with equality, each with
a multiplier. x is a solution of a convex program if and only if there are multipliers μ with

    P x + q + Cᵀμ = 0,    A x = b,    min(d − C x, μ) = 0 for the inequalities

(Boyd & Vandenberghe, Convex Optimization, 2004, 5.5.3). This is one square system F(z) = 0 in z = (x, μ). It
is semismooth: where a constraint's slack and multiplier are not both zero, F has an ordinary derivative, the
linear system of the constraints that are active (Robinson 1980).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from torch import Size, Tensor

from invlayer_core.matrices import MatrixForm

__all__ = [
    "ARGUMENTS",
    "MATRICES",
    "Measured",
    "QuadraticConditions",
    "QuadraticLayout",
    "QuadraticProgram",
    "measure",
]

ARGUMENTS = ("P", "q", "G", "h", "A", "b", "lb", "ub")
"""The arguments of a quadratic program, in the order in which they are handed around."""

MATRICES = ("P", "G", "A")


@final
@dataclass(frozen=True, eq=False)
class QuadraticLayout:
    """Which arguments a quadratic program has, and where its unknowns stand in z.

    z is x, then the multipliers of A, of G, of the lower and of the upper bounds.

    Attributes
    ----------
    size : int
        n, the number of variables.
    names : tuple of str
        The arguments that are there, in the order of :data:`ARGUMENTS`.
    forms : mapping
        How the matrices among them are held.
    """

    size: int
    names: tuple[str, ...]
    forms: Mapping[str, MatrixForm]

    @property
    def equalities(self) -> int:
        """Rows of A."""
        return self.forms["A"].rows if "A" in self.forms else 0

    @property
    def rows(self) -> int:
        """Rows of A and of G."""
        return self.equalities + (self.forms["G"].rows if "G" in self.forms else 0)

    @property
    def sections(self) -> tuple[int, int, int, int, int]:
        """The lengths of the parts of z."""
        lower, upper = ("lb" in self.names) * self.size, ("ub" in self.names) * self.size
        return self.size, self.equalities, self.rows - self.equalities, lower, upper

    def event_dims(self, name: str) -> int:
        """How many trailing dims of an argument's tensor belong to one program."""
        return self.forms[name].event_dims if name in self.forms else 1

    def program(self, theta: Sequence[Tensor]) -> QuadraticProgram:
        """The program that these tensors, in the order of ``names``, make."""
        return QuadraticProgram(self, dict(zip(self.names, theta, strict=True)))


@final
@dataclass(frozen=True, eq=False)
class QuadraticProgram:
    """A batch of quadratic programs: the layout with its tensors, each batched or shared."""

    layout: QuadraticLayout
    tensors: Mapping[str, Tensor]

    def batch(self) -> Size:
        """The batch dims of all arguments, broadcast."""
        leading = {t.shape[: t.ndim - self.layout.event_dims(name)] for name, t in self.tensors.items()}
        return leading.pop() if len(leading) == 1 else torch.broadcast_shapes(*leading)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and all multipliers."""
        return z[..., : self.layout.size], z[..., self.layout.size :]

    def curvature(self, x: Tensor) -> Tensor:
        """½ (P + Pᵀ) x."""
        if "P" not in self.tensors:
            return torch.zeros_like(x)
        form, held = self.layout.forms["P"], self.tensors["P"]
        return 0.5 * (form.multiply(held, x) + form.multiply_transposed(held, x))

    def constraints(self, x: Tensor) -> Tensor:
        """C x: the rows of A and G, then −x and x for the bounds."""
        parts = [
            self.layout.forms[name].multiply(self.tensors[name], x)
            for name in ("A", "G")
            if name in self.tensors
        ]
        parts += [sign * x for name, sign in (("lb", -1.0), ("ub", 1.0)) if name in self.tensors]
        return joined(parts, x)

    def reaction(self, multipliers: Tensor) -> Tensor | None:
        """Cᵀμ; None if there are no constraints."""
        total: Tensor | None = None
        for name, part in zip(("A", "G", "lb", "ub"), self.parts(multipliers), strict=True):
            if name not in self.tensors:
                continue
            if name in self.layout.forms:
                pulled = self.layout.forms[name].multiply_transposed(self.tensors[name], part)
            else:
                pulled = -part if name == "lb" else part
            total = pulled if total is None else total + pulled
        return total

    def parts(self, multipliers: Tensor) -> tuple[Tensor, ...]:
        """The multipliers of A, G, the lower and the upper bounds."""
        return multipliers.split(self.layout.sections[1:], -1)

    def limits(self, like: Tensor) -> Tensor:
        """d: b, h, −lb and ub, in the batch shape of ``like``."""
        parts = [
            (-self.tensors[name] if name == "lb" else self.tensors[name]).expand(*like.shape[:-1], -1)
            for name in ("b", "h", "lb", "ub")
            if name in self.tensors
        ]
        return joined(parts, like)

    def right_hand_side(self, like: Tensor) -> Tensor:
        """(−q, d), in the batch shape of ``like``; a limit of infinity bounds nothing, and is 0."""
        linear = (-self.tensors["q"]).expand(*like.shape[:-1], -1)
        limits = self.limits(like)
        return torch.cat([linear, torch.where(limits == torch.inf, torch.zeros_like(limits), limits)], -1)

    @torch.no_grad()
    def row_scales(self) -> Tensor | None:
        """The norms of the rows of C; None if every row is a bound, of norm 1."""
        norms = [
            self.layout.forms[name].row_norms(self.tensors[name].detach())
            for name in ("A", "G")
            if name in self.tensors
        ]
        if not norms:
            return None
        like = self.tensors["q"]
        norms += [like.new_ones(self.layout.size) for name in ("lb", "ub") if name in self.tensors]
        batch = torch.broadcast_shapes(*(norm.shape[:-1] for norm in norms))
        return torch.cat([norm.expand(*batch, -1) for norm in norms], -1)


@final
@dataclass(frozen=True, eq=False)
class QuadraticConditions:
    """``F(z, *theta)``: the optimality conditions of a quadratic program.

    F is relative: stationarity in units of the gradient, slack over the norm of its row in units of x (of
    ‖q‖ / ‖P‖ where it is smaller), multiplier times that norm in units of the gradient. So multiplying a row,
    the objective or x by a number changes neither F nor which constraints count as active.

    Attributes
    ----------
    layout : QuadraticLayout
    relative : bool
        False for the terms as they are, in the units of the program.
    """

    layout: QuadraticLayout
    relative: bool = True

    def __call__(self, z: Tensor, *theta: Tensor) -> Tensor:
        program = self.layout.program(theta)
        state = measure(program, z) if self.relative else measure_plainly(program, z)
        equalities = self.layout.equalities
        complementarity = torch.minimum(state.slack, state.weight)[..., equalities:]
        return torch.cat([state.stationarity, state.slack[..., :equalities], complementarity], -1)


def program_of_sample(program: QuadraticProgram, batch: torch.Size, index: int) -> QuadraticProgram:
    """One program of the batch; its arguments have no batch dims."""
    tensors = {}
    for name, tensor in program.tensors.items():
        event = program.layout.event_dims(name)
        leading, rest = tensor.shape[: tensor.ndim - event], tensor.shape[tensor.ndim - event :]
        if leading.numel() == 1:
            tensors[name] = tensor.reshape(rest)
        else:
            tensors[name] = tensor.expand(*batch, *rest).reshape(-1, *rest)[index]
    return replace(program, tensors=tensors)


@final
class Measured(NamedTuple):
    """What is known of a point z, relative to the sizes of x and of the gradient there.

    Attributes
    ----------
    stationarity : Tensor of shape ``(*batch, n)``
        P x + q + Cᵀμ.
    slack, weight : Tensor of shape ``(*batch, m)``
        Slack and multiplier of every constraint, for rows of norm 1.
    """

    stationarity: Tensor
    slack: Tensor
    weight: Tensor


def measure(program: QuadraticProgram, z: Tensor) -> Measured:
    """Stationarity, slacks and multipliers at z."""
    x, multipliers = program.split(z)
    curved, linear = program.curvature(x), program.tensors["q"]
    reaction = program.reaction(multipliers)
    size = torch.maximum(_size(x), _least_size(program, x))
    if reaction is None:
        return Measured((curved + linear) / _size(curved, linear), multipliers, multipliers)
    slack, scales = program.limits(x) - program.constraints(x), program.row_scales()
    if scales is not None:
        slack, multipliers = slack / scales, multipliers * scales
    force = _size(curved, linear, multipliers)  # of its terms, which may cancel
    return Measured((curved + linear + reaction) / force, slack / size, multipliers / force)


def measure_plainly(program: QuadraticProgram, z: Tensor) -> Measured:
    """The same in the units of the program."""
    x, multipliers = program.split(z)
    gradient = program.curvature(x) + program.tensors["q"]
    reaction = program.reaction(multipliers)
    if reaction is None:
        return Measured(gradient, multipliers, multipliers)
    return Measured(gradient + reaction, program.limits(x) - program.constraints(x), multipliers)


@torch.no_grad()
def _size(*vectors: Tensor) -> Tensor:
    """The largest ‖·‖∞ of some vectors; 1 if all are zero: ``(*batch, 1)``."""
    sizes = [vector.detach().abs().amax(-1, keepdim=True) for vector in vectors]
    size = functools.reduce(torch.maximum, sizes)
    return torch.where(size > 0, size, torch.ones_like(size))


_OF_LIMITS = 1e-3


@torch.no_grad()
def _least_size(program: QuadraticProgram, x: Tensor) -> Tensor:
    """A unit for x where it is zero but for rounding, ``(*batch, 1)``.

    ‖q‖ / ‖P‖, of which ‖P⁻¹ q‖ is no less; of a linear program a fraction of its largest finite limit.
    """
    if "P" in program.tensors:
        linear = program.tensors["q"].detach().abs().amax(-1)
        steepest = program.layout.forms["P"].largest(program.tensors["P"].detach())
        least = torch.where(steepest > 0, linear / steepest, torch.zeros_like(linear))
        return least.unsqueeze(-1)
    limits = torch.nan_to_num(program.limits(x), posinf=0.0, neginf=0.0).abs()
    if not limits.shape[-1]:
        return torch.zeros_like(x[..., :1])
    furthest = limits.amax(-1, keepdim=True)
    return _OF_LIMITS * torch.where(furthest > 0, furthest, torch.ones_like(furthest))


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The parts one after the other; empty if there are none."""
    if not parts:
        return like[..., :0]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
