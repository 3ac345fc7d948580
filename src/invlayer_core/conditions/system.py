"""A system of conditions F(y, θ) = 0 in the form that every station of the spine works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor

from invlayer_core.captured import Place, Substitution, places_of
from invlayer_core.errors import ConditionsError
from invlayer_core.structure import Arguments, SystemShape

__all__ = ["SparseJacobian", "System"]


class SparseJacobian(ABC):
    """What a ``jacobian=`` can give besides its blocks: its entries, as ``SparseLU`` needs them.

    Attributes
    ----------
    places : pair of Tensor, or None if there are none to give
        Row and column of each entry, column by column, as a ``SparsityPattern`` has them.
    """

    places: tuple[Tensor, Tensor] | None

    @abstractmethod
    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        """The blocks, ``(*batch, n, n)``."""

    @abstractmethod
    def entries(self, y: Tensor, *args: Any) -> Tensor:
        """``(*batch, nnz)``."""


@final
@dataclass(frozen=True)
class System:
    """``F(y, *args)`` with its shapes, and with θ as a flat list of tensors.

    θ is the tensors of ``args`` followed by the ``captured`` ones.

    Attributes
    ----------
    function : callable
        ``F(y, *args)``, whole-tensor: ``(*batch, *event)`` in, ``(*batch, ...)`` out.
    arguments : Arguments
        How ``args`` is rebuilt from tensors.
    shape : SystemShape
        Of y.
    captured : tuple of Tensor
        Tensors that F reads without being given them; swapped for their θ at each evaluation.
    jacobian : callable or None
        The user's own ``∂F/∂y (y, *args) -> (*batch, n, n)``, if there is one.
    measurable : bool
        False if F is known by that Jacobian alone, so that neither its value nor its pullback to y tells
        anything.
    compile : bool
        Whether derivatives of F are taken by one compiled function.
    places : tuple of (Place, Tensor)
        The parameters and buffers of the modules in F, as they stood when the solution was certified.
    parts : mapping of str to callable
        Other functions of ``(y, *args)`` that solvers and adjoints may ask for: the objective, constraints.
    reads_all : bool
        Whether F reads every captured tensor; not so if F is only a part of what was captured from.
    chunk_size : int or None
        Most rows of a Jacobian that are taken in one pass; None leaves it to the size of F.
    """

    function: Callable[..., Tensor]
    arguments: Arguments
    shape: SystemShape
    captured: tuple[Tensor, ...] = ()
    jacobian: Callable[..., Tensor] | None = None
    measurable: bool = True
    compile: bool = False
    places: tuple[tuple[Place, Tensor], ...] = ()
    parts: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    reads_all: bool = True
    chunk_size: int | None = None

    @property
    def theta(self) -> tuple[Tensor, ...]:
        """The tensors that F depends on besides y."""
        return self.arguments.tensors + self.captured

    def with_captured(self, captured: tuple[Tensor, ...]) -> System:
        """The same system, with the tensors that F captures known."""
        return replace(self, captured=captured) if captured or self.captured else self

    def with_places(self) -> System:
        """The same system, with what stands now in the modules of F: every later evaluation reads that."""
        places = places_of(self.function)
        return replace(self, places=places) if places else self

    @property
    def has_moved(self) -> bool:
        """Whether the modules of F now hold other tensors than when the solution was certified."""
        return any(place.read() is not tensor for place, tensor in self.places)

    @property
    def needs_care(self) -> bool:
        """Whether F cannot simply be called: it captures tensors for which others are to stand."""
        return bool(self.captured) or self.has_moved

    def residual(self, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """F(y, θ) in the user's own shapes."""
        return self._call(self.function, y, theta, reads_all=self.reads_all)

    def of_part(self, name: str) -> System:
        """One of the parts in the place of F."""
        return replace(self, function=self.parts[name], jacobian=None, parts={}, reads_all=False)

    def analytic_jacobian(self, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """The user's Jacobian as blocks of shape ``(B, n, n)``."""
        assert self.jacobian is not None
        blocks = self._call(self.jacobian, y, theta)
        n = self.shape.size
        if not isinstance(blocks, Tensor) or blocks.numel() != self.shape.count * n * n:
            raise ConditionsError(
                f"jacobian= returned {_describe(blocks)}; accepted is the Jacobian of the conditions with "
                f"respect to y, of shape {(*self.shape.batch, n, n)}."
            )
        return blocks.reshape(self.shape.count, n, n)

    def _call(
        self, function: Callable[..., Tensor], y: Tensor, theta: Sequence[Tensor], *, reads_all: bool = False
    ) -> Tensor:
        args = self.arguments.unflatten(theta)
        if not self.needs_care:
            return function(y, *args)
        stand_ins = theta[len(self.arguments.tensors) :]
        with Substitution(self.captured, stand_ins, self.places) as substitution:
            result = function(y, *args)
        if reads_all and not substitution.all_read:
            raise _other_tensors(self.function)
        return result

    def check_residual(self, residual: Any) -> None:
        """Refuse what is not one real residual vector per system.

        Raises
        ------
        ConditionsError
            Naming the shape or dtype that came and the one that is accepted.
        """
        batch = self.shape.batch
        called = f"conditions {getattr(self.function, '__qualname__', type(self.function).__name__)!r}"
        if not isinstance(residual, Tensor):
            raise ConditionsError(f"{called} returned {_describe(residual)}; accepted is one torch.Tensor.")
        if not residual.is_floating_point():
            raise ConditionsError(
                f"{called} returned dtype {residual.dtype}; accepted is a real floating-point tensor. "
                "If the unknowns are complex, give a complex y0."
            )
        if residual.ndim < len(batch) or residual.shape[: len(batch)] != batch:
            raise ConditionsError(
                f"{called} returned shape {tuple(residual.shape)} for y of shape {tuple(self.shape.full)}, "
                f"whose batch dims are {tuple(batch)}; accepted is {tuple(batch)} followed by one system's "
                "equations. If args are batched, give y (or y0) the same batch dims, for example "
                "y0.expand(B, n); if y is one system, raise event_dims."
            )


def _other_tensors(function: Any) -> ConditionsError:
    return ConditionsError(
        f"conditions {getattr(function, '__qualname__', type(function).__name__)!r} read a tensor with a "
        "gradient when the solution was certified that they do not read now: its gradient would be lost. "
        "Accepted are conditions that read the same tensors each time; pass others through args=(...). Those "
        "that torch.func.functional_call swaps are found in modules that the conditions are, are bound to, "
        "or close over."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__}"
