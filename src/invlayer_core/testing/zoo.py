"""The kit's problems: small regular systems ``F(y, *args)`` = 0, seeded, each to be posed as every kind.

The Jacobian of every regular system is well conditioned between the start and the solution. The map
T(y) = y − r F(y) contracts there, so that a solver which only iterates T gets to the solution too. As least
squares F are the residuals, and what is minimised is ½‖F‖², or a potential of F where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

__all__ = [
    "KINDS",
    "Case",
    "HalfNorm",
    "HalfSquare",
    "Relaxed",
    "coupled_cubic",
    "linear",
    "quadratic",
    "regular_cases",
    "square",
    "transcendental",
]

KINDS: Final = ("root", "fixed_point", "minimize", "least_squares", "nlp")
"""The problem kinds that the zoo can be posed as."""


@final
@dataclass(frozen=True)
class Relaxed:
    """``T(y, *args)`` = y − r ``F(y, *args)``, whose fixed points are the roots of F."""

    function: Callable[..., Tensor]
    relaxation: float

    def __call__(self, y: Tensor, *args: Tensor) -> Tensor:
        return y - self.relaxation * self.function(y, *args)


@final
@dataclass(frozen=True)
class HalfSquare:
    """½‖``F(y, *args)``‖², which is least at the roots of F."""

    function: Callable[..., Tensor]

    def __call__(self, y: Tensor, *args: Tensor) -> Tensor:
        return 0.5 * self.function(y, *args).square().sum(-1)


@final
@dataclass(frozen=True)
class HalfNorm:
    """½‖y‖², to be least where constraints leave no choice."""

    def __call__(self, y: Tensor, *args: Tensor) -> Tensor:
        return 0.5 * y.square().sum(-1)


@final
@dataclass(frozen=True)
class Case:
    """A batch of systems ``F(y, *args)`` = 0.

    Attributes
    ----------
    name : str
    function : callable
        F, ``(*batch, n) -> (*batch, n)``.
    start : Tensor of shape ``(*batch, n)``
    args : tuple of Tensor
        The first is ``(*batch, n)``, one row per system; the others serve all systems.
    relaxation : float
        r, for which T(y) = y − r F(y) contracts.
    exact : bool
        Whether F is sums and products of single elements: its rounding, and that of its derivatives, is
        then the same wherever in a batch a system stands, and results can be compared bit for bit.
    potential : callable or None
        f, ``(*batch, n) -> (*batch,)``, with ∇f = F.
    bracket : pair of float
        Where F of a system with one unknown (:meth:`scalar`) changes its sign.
    """

    name: str
    function: Callable[..., Tensor]
    start: Tensor
    args: tuple[Tensor, ...]
    relaxation: float
    exact: bool
    bracket: tuple[float, float] = (-9.0, 9.0)
    potential: Callable[..., Tensor] | None = None

    def posed(self, kind: str) -> Callable[..., Tensor]:
        """F for ``"root"`` and ``"least_squares"``, T for ``"fixed_point"``, f for ``"minimize"``.

        For ``"nlp"`` it is F again: the constraint F(y) = 0, under which ½‖y‖² is least at the root.
        """
        if kind == "fixed_point":
            return Relaxed(self.function, self.relaxation)
        if kind == "minimize":
            return self.potential or HalfSquare(self.function)
        return self.function

    def is_exact(self, kind: str) -> bool:
        """Whether rounding is the same wherever a system stands; an objective is a sum over its unknowns."""
        return self.exact and kind in ("root", "fixed_point")

    def select(self, index: Any) -> Case:
        """The systems at ``index`` of the batch, in that order."""
        return replace(self, start=self.start[index], args=(self.args[0][index], *self.args[1:]))

    def scalar(self) -> Case:
        """The first unknown of every system with the first equation: scalar equations."""
        own, *shared = self.args
        return replace(
            self,
            start=self.start[..., :1],
            args=(own[..., :1], *(arg[tuple(slice(1) for _ in arg.shape)] for arg in shared)),
        )

    def spread(self, width: float) -> Case:
        """The same systems with starts up to ``width`` further away, so that some take more iterations."""
        ramp = torch.linspace(0, width, len(self.start), dtype=self.start.dtype)
        return replace(self, start=self.start + ramp.unsqueeze(-1))

    def shifted(self, by: float, index: Any = slice(None)) -> Case:
        """The same systems with ``by`` added to the first arg, in the systems at ``index``."""
        first = self.args[0].clone()
        first[index] += by
        return replace(self, args=(first, *self.args[1:]))

    def to(self, dtype: torch.dtype) -> Case:
        """The same systems in another precision."""
        return replace(self, start=self.start.to(dtype), args=tuple(arg.to(dtype) for arg in self.args))


def linear(batch: tuple[int, ...] = (3,), size: int = 5) -> Case:
    """A y = b."""
    b, noise = _uniform((*batch, size), -1, 1), _uniform((size, size), -1, 1, seed=1)
    A = torch.eye(size, dtype=torch.float64) + 0.3 * noise / size
    return Case("linear", _linear, torch.zeros_like(b), (b, A), 0.8, exact=False)


def _linear(y: Tensor, b: Tensor, A: Tensor) -> Tensor:
    return y @ A.mT - b


def quadratic(batch: tuple[int, ...] = (3,), size: int = 2) -> Case:
    """y² + 2y = b, element by element; two roots each, −1 ± √(1 + b)."""
    b = _uniform((*batch, size), 0.5, 2.0, seed=2)
    return Case(
        "quadratic", _quadratic, torch.ones_like(b), (b,), 0.25, exact=True, bracket=(-1.0, 3.0),
        potential=_potential_of_quadratic,
    )  # fmt: skip


def _quadratic(y: Tensor, b: Tensor) -> Tensor:
    return y * y + 2 * y - b


def _potential_of_quadratic(y: Tensor, b: Tensor) -> Tensor:
    return (y**3 / 3 + y * y - b * y).sum(-1)


def square(batch: tuple[int, ...] = (4,), size: int = 2) -> Case:
    """y² = b, element by element; without a root where b < 0."""
    b = _uniform((*batch, size), 0.5, 2.0, seed=3)
    return Case(
        "square", _square, torch.ones_like(b), (b,), 0.25, exact=True, bracket=(0.0, 3.0),
        potential=_potential_of_square,
    )  # fmt: skip


def _square(y: Tensor, b: Tensor) -> Tensor:
    return y * y - b


def _potential_of_square(y: Tensor, b: Tensor) -> Tensor:
    return (y**3 / 3 - b * y).sum(-1)


def coupled_cubic(batch: tuple[int, ...] = (3,), size: int = 4) -> Case:
    """y + A y³ = b with A symmetric positive definite, so that the root is the only one."""
    b, noise = _uniform((*batch, size), -1, 1, seed=4), _uniform((size, size), -1, 1, seed=5)
    A = 0.2 * noise @ noise.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    return Case("coupled cubic", _coupled_cubic, torch.zeros_like(b), (b, A), 0.4, exact=True)


def _coupled_cubic(y: Tensor, b: Tensor, A: Tensor) -> Tensor:
    # Column by column: the order of a matrix product's sums depends on the shapes, this one's does not.
    residual = y - b
    for j in range(y.shape[-1]):
        column = y[..., j : j + 1]
        residual = residual + A[:, j] * (column * column * column)
    return residual


def transcendental(batch: tuple[int, ...] = (3,), size: int = 2) -> Case:
    """y + exp(y/2) + 0.3 sin(y of the next unknown) = b."""
    b = _uniform((*batch, size), 0.5, 2.5, seed=6)
    return Case("transcendental", _transcendental, torch.zeros_like(b), (b,), 0.5, exact=False)


def _transcendental(y: Tensor, b: Tensor) -> Tensor:
    return y + torch.exp(y / 2) + 0.3 * torch.sin(y.roll(1, -1)) - b


def regular_cases() -> tuple[Case, ...]:
    """One case of each regular system, every one a batch of 3."""
    return linear(), quadratic(), coupled_cubic(), transcendental()


def _uniform(shape: tuple[int, ...], low: float, high: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
