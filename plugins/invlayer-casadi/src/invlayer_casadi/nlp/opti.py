"""An Opti stack as a layer: parameters in, expressions of its variables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import casadi as ca
import numpy as np
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_casadi.expressions.expression import Backend
from invlayer_casadi.function import CasadiFunction
from invlayer_casadi.nlp.problem import NlpProblem, NlpSettings
from invlayer_casadi.nlp.program import NlpProgram
from invlayer_casadi.nlp.solver_functions import make_nlpsol
from invlayer_core import ConditionsError

__all__ = ["OptiProblem"]


@final
class OptiProblem:
    """What an Opti stack states, as Functions; the stack itself is not kept.

    Parameters
    ----------
    parameters : CasadiFunction
        The user's parameters ↦ the stack's parameter vector.
    bounds : CasadiFunction
        Parameter vector ↦ lbg, ubg.
    outputs : CasadiFunction
        ``(x, p, λ)`` ↦ what the user wants.
    guess : sequence of float
        The stack's own initial guess of x.
    inner : NlpProblem
    """

    def __init__(
        self,
        parameters: CasadiFunction | None,
        bounds: CasadiFunction,
        outputs: CasadiFunction,
        guess: Sequence[float],
        inner: NlpProblem,
    ) -> None:
        self.parameters, self.bounds, self.outputs = parameters, bounds, outputs
        self.guess, self.inner = tuple(guess), inner

    @classmethod
    def of(
        cls,
        opti: Any,
        parameters: Sequence[Any],
        outputs: Sequence[Any],
        solver: str | None,
        options: Mapping[str, Any] | None,
        settings: NlpSettings,
        backend: Backend,
    ) -> OptiProblem:
        """Take an Opti stack apart.

        Raises
        ------
        ConditionsError
            If parameters are missing, or an output holds other symbols than the stack's.
        """
        if not isinstance(opti, ca.Opti):
            raise ConditionsError(f"CasadiLayer.from_opti({type(opti).__name__}): accepted is a casadi.Opti.")
        with BUILDING:
            oracle = ca.Function("nlp", [opti.x, opti.p], [opti.f, opti.g], ["x", "p"], ["f", "g"])
            bounds = ca.Function("bounds", [opti.p], [opti.lbg, opti.ubg])
            vector = _function("parameters", list(parameters), [opti.p], "parameters")
            wanted = _function("outputs", [opti.x, opti.p, opti.lam_g], list(outputs), "outputs")
            function = _own_solver(opti) if solver is None else None
        program = NlpProgram(oracle, backend)
        if function is None:
            function = make_nlpsol(program.oracle, solver or "ipopt", options)
        inner = NlpProblem(program, function, replace(settings, outputs=("x", "lam_g"), single=False))
        return cls(
            CasadiFunction(vector) if vector.n_in() else None,
            CasadiFunction(bounds),
            CasadiFunction(wanted),
            np.reshape(opti.debug.value(opti.x, opti.initial()), -1).tolist(),
            inner,
        )

    def solve(self, *parameters: Any, **guesses: Any) -> Any:
        """The outputs; guesses are ``x0``, ``lam_x0`` and ``lam_g0`` of the whole stack."""
        unknown = sorted(set(guesses) - {"x0", "lam_x0", "lam_g0"})
        if unknown:
            raise TypeError(
                f"CasadiLayer.from_opti: unknown inputs {unknown}; accepted are the parameters in "
                "their order, and x0, lam_x0, lam_g0."
            )
        p = self.parameters(*parameters) if self.parameters is not None else None
        like = p if p is not None else torch.empty(0, dtype=torch.float64)
        vector = like.new_zeros(0) if p is None else p
        lbg, ubg = self.bounds(vector)
        guesses.setdefault("x0", torch.tensor(self.guess, dtype=like.dtype, device=like.device))
        found = self.inner.solve(p, lbg=lbg, ubg=ubg, **guesses)
        (x, lam_g), *info = found if self.inner.settings.keywords.get("return_info") else (found,)
        results: Tensor | tuple[Tensor, ...] = self.outputs(x, vector, lam_g)
        return (results, *info) if info else results


def _function(name: str, inputs: list[Any], outputs: list[Any], what: str) -> ca.Function:
    try:
        return ca.Function(name, inputs, outputs)
    except (RuntimeError, NotImplementedError) as error:
        last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
        raise ConditionsError(
            f"CasadiLayer.from_opti: {what} do not fit the stack ({' '.join(last)}). Accepted "
            "are parameters=[...] with every opti.parameter() of the problem, and outputs=[...] of "
            "expressions in its variables, parameters and duals."
        ) from error


def _own_solver(opti: Any) -> ca.Function | None:
    """The nlpsol Function that the stack has been given by ``opti.solver``, if it has."""
    try:
        whole = opti.to_function("whole", [opti.p] if opti.np else [], [opti.x])
    except RuntimeError:  # no solver chosen
        return None
    return next((inner for inner in whole.find_functions() if inner.is_a("Nlpsol")), None)
