"""The problem as a solver sees it: conditions F(y) = 0 with their args bound, for one sample or a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple, final

import numpy as np
from torch import Tensor

from invlayer_core.errors import ConditionsError

__all__ = ["BatchProblem", "Problem", "Products", "SampleProblem", "products_of"]


class Problem(ABC):
    """The conditions F(y) = 0 with their args bound, as a solver sees them.

    A problem of optimisation has more to it than its conditions. What its kind has besides F is here:

    =================  =================================================================================
    kind               beside ``residual`` and ``jacobian``
    =================  =================================================================================
    root, fixed_point  nothing
    minimize           ``objective``; F is its gradient, and J its Hessian: ``gradient``, ``hessian``
    least_squares      ``residuals``, ``residuals_jacobian``; ``objective`` = ½‖r‖², its gradient, Hessian
    nlp                as minimize; ``equalities``, ``inequalities`` (≥ 0), their Jacobians, the bounds
    =================  =================================================================================

    Attributes
    ----------
    kind : str
        ``"root"``, ``"fixed_point"``, ... : which of ``SolverSpec.kinds`` is asked for.
    size : int
        n, the number of unknowns of one system, flattened.
    parts : mapping of str to callable
        Functions of y beside F, by name.
    """

    kind: str
    size: int
    parts: Mapping[str, Callable[[Any], Any]]

    @abstractmethod
    def residual(self, y: Any) -> Any:
        """F(y), in the shape and array type of ``y``."""

    @abstractmethod
    def jacobian(self, y: Any) -> Any:
        """∂F/∂y at ``y``, from one evaluation of F; shape of ``y`` with one more dimension n."""

    @abstractmethod
    def second_derivative(self, y: Any) -> Any:
        """d²F/dy² of scalar equations (n = 1), in the shape of ``y``.

        Raises
        ------
        ConditionsError
            If n is not 1, or the problem was made without it.
        """

    def has(self, part: str) -> bool:
        """Whether the problem has a part of this name, such as ``"inequalities"``."""
        return part in self.parts

    def part(self, name: str, y: Any) -> Any:
        """One of ``parts`` at ``y``.

        Raises
        ------
        ConditionsError
            If the problem has no such part.
        """
        if name not in self.parts:
            raise ConditionsError(
                f"{name}() of a problem of kind {self.kind!r}, which has {sorted(self.parts) or 'no parts'}. "
                "Accepted are its own parts; has(name) tells."
            )
        return self.parts[name](y)

    def objective(self, y: Any) -> Any:
        """What is minimised: a number, or ``(B,)``."""
        return self.part("objective", y)

    def gradient(self, y: Any) -> Any:
        """∇ of the objective, in the shape of ``y``: the residual of its conditions."""
        return self.residual(y)

    def hessian(self, y: Any) -> Any:
        """∇² of the objective: the Jacobian of its conditions."""
        return self.jacobian(y)

    def residuals(self, y: Any) -> Any:
        """r(y) of least squares, ``(m,)`` or ``(B, m)``."""
        return self.part("residuals", y)

    def residuals_jacobian(self, y: Any) -> Any:
        """∂r/∂y, ``(m, n)`` or ``(B, m, n)``."""
        return self.part("residuals_jacobian", y)

    def equalities(self, y: Any) -> Any:
        """h(y), zero at a solution: ``(p,)`` or ``(B, p)``."""
        return self.part("equalities", y)

    def equalities_jacobian(self, y: Any) -> Any:
        """∂h/∂y, ``(p, n)`` or ``(B, p, n)``."""
        return self.part("equalities_jacobian", y)

    def inequalities(self, y: Any) -> Any:
        """c(y), not negative at a solution: ``(m,)`` or ``(B, m)``."""
        return self.part("inequalities", y)

    def inequalities_jacobian(self, y: Any) -> Any:
        """∂c/∂y, ``(m, n)`` or ``(B, m, n)``."""
        return self.part("inequalities_jacobian", y)

    def lower(self, y: Any) -> Any:
        """The lower bounds, in the shape of ``y``; −∞ where there is none."""
        return self.part("lower", y)

    def upper(self, y: Any) -> Any:
        """The upper bounds, in the shape of ``y``; ∞ where there is none."""
        return self.part("upper", y)


@final
class Products(NamedTuple):
    """A function at a point, with the products of its Jacobian J there, which is not formed."""

    value: Tensor  # (B, m)
    push: Callable[[Tensor], Tensor]  # J v, (B, n) -> (B, m)
    pull: Callable[[Tensor], Tensor]  # Jᵀu, (B, m) -> (B, n)


@final
@dataclass(frozen=True)
class BatchProblem(Problem):
    """A batch of B independent systems in torch: ``(B, n)`` tensors in, ``(B, n)`` out.

    Attributes
    ----------
    kind, size, parts : see :class:`Problem`
    batch : int
        B, the number of systems.
    residual_function, jacobian_function : callables
        ``(B, n) -> (B, n)`` and ``(B, n) -> (B, n, n)``; both run without recording gradients.
    second_derivative_function : callable, optional
        ``(B, 1) -> (B, 1)``.
    linearized_function : callable, optional
        F or a part, by name, with its Jacobian, from one evaluation.
    products_function : callable, optional
        The same with the products of its Jacobian.
    """

    kind: str
    size: int
    batch: int
    residual_function: Callable[[Tensor], Tensor]
    jacobian_function: Callable[[Tensor], Tensor]
    second_derivative_function: Callable[[Tensor], Tensor] | None = None
    parts: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    linearized_function: Callable[[str, Tensor], tuple[Tensor, Tensor]] | None = None
    products_function: Callable[[str, Tensor], Products] | None = None

    def residual(self, y: Tensor) -> Tensor:
        return self.residual_function(y)

    def linearized(self, y: Tensor, part: str = "residual") -> tuple[Tensor, Tensor]:
        """F(y) and ∂F/∂y, or a part and its Jacobian, from one evaluation."""
        if self.linearized_function is not None:
            return self.linearized_function(part, y)
        if part == "residual":
            return self.residual(y), self.jacobian(y)
        return self.part(part, y), self.part(f"{part}_jacobian", y)

    def products(self, y: Tensor, part: str = "residual") -> Products:
        """F or a part at y, with the products of its Jacobian: for systems too large to form it."""
        if self.products_function is not None:
            return self.products_function(part, y)
        return products_of(*self.linearized(y, part))

    def jacobian(self, y: Tensor) -> Tensor:
        return self.jacobian_function(y)

    def second_derivative(self, y: Tensor) -> Tensor:
        return _scalar_only(self.size, self.second_derivative_function)(y)


def products_of(value: Tensor, blocks: Tensor) -> Products:
    """The products of a Jacobian that is there."""
    return Products(
        value,
        lambda v: (blocks @ v.unsqueeze(-1)).squeeze(-1),
        lambda u: (blocks.mT @ u.unsqueeze(-1)).squeeze(-1),
    )


@final
@dataclass(frozen=True)
class SampleProblem(Problem):
    """One system in float64 NumPy: ``(n,)`` arrays in, ``(n,)`` or ``(n, n)`` arrays out.

    Attributes
    ----------
    kind, size, parts : see :class:`Problem`
    index : int
        Which sample of the batch this is.
    residual_function, jacobian_function : callables
        ``(n,) -> (n,)`` and ``(n,) -> (n, n)``; F itself is evaluated in torch, where its tensors live.
    second_derivative_function : callable, optional
        ``(1,) -> (1,)``.
    precision : float
        The rounding unit of F, which may be evaluated in float32: values are no more exact than that, though
        they come as float64.
    scalar_function : callable, optional
        F of one equation in one unknown, from float to float: faster than by arrays of one element.
    """

    kind: str
    size: int
    index: int
    residual_function: Callable[[np.ndarray], np.ndarray]
    jacobian_function: Callable[[np.ndarray], np.ndarray]
    second_derivative_function: Callable[[np.ndarray], np.ndarray] | None = None
    parts: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    precision: float = 2.0**-52
    scalar_function: Callable[[float], float] | None = None

    def residual(self, y: np.ndarray) -> np.ndarray:
        return self.residual_function(y)

    def jacobian(self, y: np.ndarray) -> np.ndarray:
        return self.jacobian_function(y)

    def second_derivative(self, y: np.ndarray) -> np.ndarray:
        return _scalar_only(self.size, self.second_derivative_function)(y)

    def value(self, x: float) -> float:
        """F of a scalar equation (n = 1), from number to number."""
        if self.scalar_function is not None:
            return self.scalar_function(x)
        return float(self.residual_function(np.array([x], dtype=np.float64))[0])

    def release(self) -> None:
        """Let go of F, and of all tensors with it; called when the solve is over.

        Libraries wrap what they are given in functions that refer to themselves (SciPy's count their calls
        that way), and so keep it until Python collects garbage, which knows nothing of a device's memory.
        """
        vars(self).update(_RELEASED)

    def objective(self, y: np.ndarray) -> float:
        value = self.part("objective", y)
        if getattr(value, "ndim", 0):
            raise ConditionsError(
                f"the objective returned shape {tuple(value.shape)} for one system of {self.size} unknowns; "
                "accepted is one real number per sample. Sum over the event dims: (...).sum(-1)."
            )
        return float(value)


def _over(_y: Any) -> Any:
    raise ConditionsError(
        "a problem was asked for F after its solve had returned: it lets go of its tensors then. Accepted "
        "are calls within solve(); keep values, and not the problem."
    )


_RELEASED: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "residual_function": _over,
        "jacobian_function": _over,
        "second_derivative_function": _over,
        "scalar_function": _over,
        "parts": MappingProxyType({}),
    }
)


def _scalar_only(size: int, function: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    if size != 1 or function is None:
        raise ConditionsError(
            f"second_derivative() of a problem with n = {size} unknowns: accepted are scalar equations "
            "(n = 1) with a second_derivative_function; F″ of larger systems is not formed."
        )
    return function
