"""A ``casadi.conic`` Function as a layer: the matrices of a quadratic program are its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, final

import casadi as ca
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import BUILDING
from invlayer_casadi.expressions.ports import Port
from invlayer_casadi.nlp.problem import NlpProblem, NlpSettings
from invlayer_casadi.nlp.program import NlpProgram
from invlayer_core import ConditionsError

__all__ = ["ConicProblem"]

_OUTPUTS: Final = {"x": "x", "cost": "f", "lam_x": "lam_x", "lam_a": "lam_g"}
_INPUTS: Final = {
    **{name: name for name in ("lbx", "ubx", "x0", "lam_x0")},
    "lba": "lbg",
    "uba": "ubg",
    "lam_a0": "lam_g0",
}
_CALLED: Final = "CasadiLayer.from_conic"


@final
class ConicProblem:
    """min ½ xᵀHx + gᵀx such that lba ≤ A x ≤ uba, lbx ≤ x ≤ ubx, with H, g and A as parameters.

    Parameters
    ----------
    function : casadi.Function
        Made by ``casadi.conic``.
    settings : NlpSettings
    names : tuple of str
        The outputs, as ``casadi.conic`` calls them.
    """

    def __init__(self, function: ca.Function, settings: NlpSettings, names: tuple[str, ...]) -> None:
        self.function, self.settings, self.names = function, settings, names
        self.ports = tuple(Port(name, function.sparsity_in(name)) for name in ("h", "g", "a"))
        with BUILDING:
            program, whole = _program(function), _as_nlpsol(function)
        outputs = tuple(_OUTPUTS[name] for name in names)
        self.inner = NlpProblem(NlpProgram(program), whole, replace(settings, outputs=outputs))

    def __reduce__(self) -> tuple[Any, ...]:
        return ConicProblem, (self.function, self.settings, self.names)

    @classmethod
    def of(
        cls, function: Any, outputs: str | Sequence[str], threads: int, keywords: dict[str, Any]
    ) -> ConicProblem:
        """Check a user's choices.

        Raises
        ------
        ConditionsError
            If the Function is none of ``casadi.conic``, or an output is not one of its own.
        """
        if (
            not isinstance(function, ca.Function)
            or function.is_null()
            or [function.name_in(i) for i in range(min(3, function.n_in()))] != ["h", "g", "a"]
        ):
            raise ConditionsError(f"{_CALLED}({function!r}): accepted is a Function made by casadi.conic.")
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        if not names or not set(names) <= set(_OUTPUTS):
            raise ConditionsError(f"outputs={outputs!r}: accepted are one or more of {sorted(_OUTPUTS)}.")
        settings = NlpSettings.read("x", "exact", threads, keywords)
        return cls(function, replace(settings, single=isinstance(outputs, str)), names)

    @property
    def pattern_of_a(self) -> Tensor:
        """1 where A has an entry, ``(m, n)``."""
        port = self.ports[2]
        return port.dense(torch.ones(port.sparsity.nnz(), dtype=torch.float64))

    def solve(self, h: Tensor, g: Tensor, a: Tensor | None = None, **given: Any) -> Any:
        """The outputs; H is symmetric, and entries outside the patterns of H and A are ignored."""
        unknown = sorted(set(given) - set(_INPUTS))
        if unknown:
            raise TypeError(
                f"{_CALLED}: unknown inputs {unknown}; accepted are h, g, a and {sorted(_INPUTS)}."
            )
        if a is None:
            a = g.new_zeros(self.ports[2].event)
        pairs = list(zip(self.ports, (h, g, a), strict=True))
        batch = torch.broadcast_shapes(*(port.batch_of(tensor, _CALLED) for port, tensor in pairs))
        p = torch.cat([port.nonzeros(tensor).expand(*batch, -1) for port, tensor in pairs], -1)
        return self.inner.solve(p, **{_INPUTS[name]: value for name, value in given.items()})


def _matrices(function: ca.Function, p: Any) -> tuple[Any, Any, Any]:
    """H, g and A from their nonzeros, joined."""
    of_h, of_g, of_a = (function.sparsity_in(name) for name in ("h", "g", "a"))
    kind: Any = type(p)
    first, second = of_h.nnz(), of_h.nnz() + of_g.nnz()
    return kind(of_h, p[:first]), kind(of_g, p[first:second]), kind(of_a, p[second:])


def _sizes(function: ca.Function) -> tuple[int, int, int]:
    nonzeros = sum(function.nnz_in(name) for name in ("h", "g", "a"))
    return function.numel_in("g"), function.size1_in("a"), nonzeros


def _program(function: ca.Function) -> ca.Function:
    n, _, size = _sizes(function)
    x, p = ca.SX.sym("x", n), ca.SX.sym("p", size)
    h, g, a = _matrices(function, p)
    return ca.Function("qp", [x, p], [ca.bilin(h, x, x) / 2 + ca.dot(g, x), a @ x], ["x", "p"], ["f", "g"])


def _as_nlpsol(function: ca.Function) -> ca.Function:
    """The same with the inputs and outputs of ``casadi.nlpsol``."""
    n, m, size = _sizes(function)
    sizes = {"x0": n, "p": size, "lbx": n, "ubx": n, "lbg": m, "ubg": m, "lam_x0": n, "lam_g0": m}
    inputs = {name: ca.MX.sym(name, length) for name, length in sizes.items()}
    h, g, a = _matrices(function, inputs["p"])
    found = function(
        h=h, g=g, a=a, lba=inputs["lbg"], uba=inputs["ubg"], lam_a0=inputs["lam_g0"],
        **{name: inputs[name] for name in ("lbx", "ubx", "x0", "lam_x0")},
    )  # fmt: skip
    x, multipliers = found["x"], {"lam_x": found["lam_x"], "lam_g": found["lam_a"]}
    outputs = {"x": x, "f": found["cost"], "g": a @ x, **multipliers}
    return ca.Function("solve", list(inputs.values()), list(outputs.values()), list(inputs), list(outputs))
