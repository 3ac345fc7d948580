"""A nonlinear program taken apart into the Functions that its conditions and their Jacobian are made of.

    min f(x, p)   such that   lbg ≤ g(x, p) ≤ ubg,   lbx ≤ x ≤ ubx

CasADi's Lagrangian is f + λᵀg + νᵀx: a multiplier is positive at an upper bound, negative at a lower one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import casadi as ca
import numpy as np
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_casadi.expressions.expression import Backend, Expression
from invlayer_casadi.function import CasadiFunction
from invlayer_core import ConditionsError

__all__ = ["NlpProgram"]


@final
class NlpProgram:
    """The derivatives of one nonlinear program, all by CasADi.

    Parameters
    ----------
    oracle : casadi.Function
        ``(x, p) -> (f, g)``.
    backend : {"auto", "casadi", "torch"}
        Who evaluates in the conditions.

    Attributes
    ----------
    unknowns, constraints, parameters : int
    values : CasadiFunction
        ``(x, p) -> (f, g)``.
    uneven : Tensor of shape ``(n,)``
        A direction that leaves out no unknown.
    """

    def __init__(self, oracle: ca.Function, backend: Backend = "auto") -> None:
        self.oracle, self.backend = oracle, backend
        with BUILDING:
            expanded = _expanded(oracle)
            self.unknowns, self.constraints = expanded.numel_in(0), expanded.numel_out(1)
            self.parameters = expanded.numel_in(1)
            first, second = _derivatives(expanded)
            self.values = CasadiFunction(expanded, backend=backend)
            self._first, self._second = Expression(first, backend), Expression(second, backend)
        self.uneven = torch.sin(1.0 + 2.4 * torch.arange(self.unknowns, dtype=torch.float64))

    def __reduce__(self) -> tuple[Any, ...]:
        return NlpProgram, (self.oracle, self.backend)

    @classmethod
    def of(cls, problem: Mapping[str, Any], backend: Backend) -> NlpProgram:
        """Read ``{"x": ..., "f": ..., "p": ..., "g": ...}``, as ``casadi.nlpsol`` takes it.

        Raises
        ------
        ConditionsError
            For other keys, or without ``x`` and ``f``.
        """
        unknown = sorted(set(problem) - {"x", "p", "f", "g"})
        if unknown or "x" not in problem or "f" not in problem:
            raise ConditionsError(
                f"CasadiLayer: the problem has the keys {sorted(problem)}; accepted are 'x' and 'f', and 'p' "
                "and 'g' where there are parameters and constraints."
            )
        x = problem["x"]
        kind = type(x)
        p, g = problem.get("p", kind(0, 1)), problem.get("g", kind(0, 1))
        with BUILDING:
            oracle = ca.Function("nlp", [x, p], [problem["f"], g], ["x", "p"], ["f", "g"])
        return cls(oracle, backend)

    def first(self, x: Tensor, p: Tensor, lam_g: Tensor) -> tuple[Tensor, ...]:
        """∇ₓf + ∂gᵀλ and g, of x and λ ``(*batch, k)`` and p, which broadcasts to them."""
        return self._first(x, p.expand(*x.shape[:-1], p.shape[-1]), lam_g)

    def second(self, x: Tensor, p: Tensor, lam_g: Tensor) -> tuple[Tensor, ...]:
        """Nonzeros of ∇²ₓ of the Lagrangian and of ∂g/∂x, and what ``first`` gives."""
        return self._second(x, p.expand(*x.shape[:-1], p.shape[-1]), lam_g)

    @cached_property
    def hessian_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the nonzeros of the Hessian."""
        return _places(self._second.function.sparsity_out(0))

    @cached_property
    def jacobian_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the nonzeros of ∂g/∂x."""
        return _places(self._second.function.sparsity_out(1))


def _places(sparsity: ca.Sparsity) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = sparsity.get_triplet()
    return np.asarray(rows, np.int64), np.asarray(columns, np.int64)


def _expanded(oracle: ca.Function) -> ca.Function:
    """In scalar operations where that is possible, which evaluates and differentiates faster."""
    try:
        expanded: ca.Function = oracle if oracle.is_a("SXFunction") else oracle.expand()
    except RuntimeError:
        return oracle
    return expanded


def _derivatives(oracle: ca.Function) -> tuple[ca.Function, ca.Function]:
    kind: Any = ca.SX if oracle.is_a("SXFunction") else ca.MX
    x, p = (kind.sym(name, oracle.sparsity_in(i)) for i, name in enumerate("xp"))
    multipliers = kind.sym("lam_g", oracle.numel_out(1))
    objective, constraints = oracle(x, p)
    constraints = ca.densify(constraints)
    lagrangian = objective + ca.dot(multipliers, constraints) if oracle.numel_out(1) else objective
    gradient = ca.densify(ca.gradient(lagrangian, x))
    hessian, _ = ca.hessian(lagrangian, x)
    inputs, names = [x, p, multipliers], ["x", "p", "lam_g"]
    once = {"cse": True}  # nothing is computed twice: every evaluation and derivative goes through it
    first = ca.Function("conditions", inputs, [gradient, constraints], names, ["gradient", "g"], once)
    jacobian = ca.jacobian(constraints, x)
    outputs = [hessian, jacobian, gradient, constraints]
    second = ca.Function("second", inputs, outputs, names, ["hessian", "jacobian", "gradient", "g"])
    return first, second
