"""A nonlinear program as a layer: what it is given, the engine's root of its conditions, what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import casadi as ca
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi.nlp.conditions import ACTIVITIES, Activity, NlpConditions
from invlayer_casadi.nlp.jacobian import NlpJacobian
from invlayer_casadi.nlp.native import NativeNlp
from invlayer_casadi.nlp.native_sensitivities import NativeSensitivities
from invlayer_casadi.nlp.program import NlpProgram

__all__ = ["OUTPUTS", "NlpProblem", "NlpSettings"]

OUTPUTS: Final = ("x", "f", "g", "lam_x", "lam_g")
_GIVEN: Final = ("p", "lbx", "ubx", "lbg", "ubg")
_DENSE_UP_TO: Final = 60  # unknowns and multipliers
_SUPERLU: Final = {"permc_spec": "COLAMD", "relax": 1, "panel_size": 1}  # half the fill of A + Aᵀ here


@final
@dataclass(frozen=True)
class NlpSettings:
    """What a user chooses of a layer.

    Attributes
    ----------
    outputs : tuple of str
    single : bool
        Whether one output is returned as it is, and not as a tuple.
    activity : {"exact", "soft"}
    threads : int
    keywords : dict
        Those of :func:`invlayer_core.root`.
    min_lam : float, optional
        With CasADi's own sensitivities: from which multiplier on a constraint is active for them.
    """

    outputs: tuple[str, ...]
    single: bool
    activity: Activity
    threads: int
    keywords: dict[str, Any]
    min_lam: float | None = None

    @classmethod
    def read(cls, outputs: Any, activity: Any, threads: Any, keywords: dict[str, Any]) -> NlpSettings:
        """Check a user's choices."""
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        unknown = sorted(set(names) - set(OUTPUTS))
        if unknown or not names:
            raise inv.ConditionsError(f"outputs={outputs!r}: accepted are one or more of {list(OUTPUTS)}.")
        if activity not in ACTIVITIES:
            raise inv.ConditionsError(f"activity={activity!r}: accepted are {list(ACTIVITIES)}.")
        if not isinstance(threads, int) or threads < 1:
            raise inv.ConditionsError(f"threads={threads!r}: accepted is a number of threads >= 1.")
        return cls(names, isinstance(outputs, str), activity, threads, keywords)


@final
class NlpProblem:
    """The program, a Function that solves it, and the conditions that certify and differentiate it.

    Parameters
    ----------
    program : NlpProgram
    function : casadi.Function
        With the inputs and outputs of ``casadi.nlpsol``.
    settings : NlpSettings
    """

    def __init__(self, program: NlpProgram, function: ca.Function, settings: NlpSettings) -> None:
        self.program, self.function, self.settings = program, function, settings
        self.size = 2 * program.unknowns + program.constraints
        self.sparse = self.size > _DENSE_UP_TO
        self.conditions = NlpConditions(program, settings.activity)
        self.jacobian = NlpJacobian(self.conditions)
        self.keywords = dict(settings.keywords)
        self.keywords.setdefault("polish", 0 if settings.activity == "soft" else "auto")
        self.solver = NativeNlp(function, settings.threads)
        self.keywords.setdefault("adjoint", self._adjoint())
        self.native = None if settings.min_lam is None else NativeSensitivities(function, settings.min_lam)

    def __reduce__(self) -> tuple[Any, ...]:
        return NlpProblem, (self.program, self.function, self.settings)

    def _adjoint(self) -> inv.adjoints.Implicit:
        """Dense and forgiving where it is small; by sparse factors else."""
        if not self.sparse:
            return inv.adjoints.Implicit(singular="consistent")
        method = inv.linear.SparseLU(self.jacobian.pattern, options=_SUPERLU)
        return inv.adjoints.Implicit(linear_solver=method)

    def solve(self, p: Any = None, **given: Any) -> Any:
        """The outputs asked for, with the info if that is asked for, too."""
        values = self._read(p, given)
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in values.values()))
        guesses = [values[name].detach().expand(*batch, -1) for name in ("x0", "lam_g0", "lam_x0")]
        conditions = self.conditions.of_one_call()
        unit = conditions.unit(guesses[0], values["p"].detach(), guesses[1])
        start = torch.cat([guesses[0], guesses[1] / unit, guesses[2] / unit], -1)
        args = (*(values[name] for name in _GIVEN), unit)
        options = {
            name: arg.detach().expand(*batch, arg.shape[-1])
            for name, arg in zip((*_GIVEN, "unit"), args, strict=True)
        }
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.native is None):
            found = inv.root(
                conditions, start, args, solver=self.solver, options=options,
                jacobian=self.jacobian.of(conditions), **self.keywords,
            )  # fmt: skip
        z, *info = found if self.keywords.get("return_info") else (found,)
        self._warn_of_weakly_active(conditions, z, args)
        results = self._outputs(z, values, unit)
        return (results, *info) if info else results

    def _read(self, p: Any, given: dict[str, Any]) -> dict[str, Tensor]:
        """Everything that CasADi's solvers take, as tensors ``(*batch, k)``."""
        n, m = self.program.unknowns, self.program.constraints
        sizes = {"x0": n, "lbx": n, "ubx": n, "lbg": m, "ubg": m, "lam_x0": n, "lam_g0": m}
        unknown = sorted(set(given) - set(sizes))
        if unknown:
            raise TypeError(f"CasadiLayer: unknown inputs {unknown}; accepted are p and {sorted(sizes)}.")
        if (p is None) != (self.program.parameters == 0):
            raise inv.ConditionsError(
                f"CasadiLayer: the problem has {self.program.parameters} parameters, and p "
                f"{'is missing' if p is None else 'was given'}; accepted is layer(p, lbx=..., ...) where "
                "there are some, and layer(lbx=..., ...) where there are none."
            )
        like = _first_tensor([p, *given.values()])
        defaults = {"lbx": -torch.inf, "ubx": torch.inf, "lbg": -torch.inf, "ubg": torch.inf}
        values = {"p": _tensor("p", p, self.program.parameters, 0.0, like)}
        for name, size in sizes.items():
            values[name] = _tensor(name, given.get(name), size, defaults.get(name, 0.0), like)
        dtype = like.dtype
        for value in values.values():
            dtype = torch.promote_types(dtype, value.dtype)
        return {name: value.to(dtype) for name, value in values.items()}

    def _outputs(self, z: Tensor, values: dict[str, Tensor], unit: Tensor) -> Any:
        x, lam_g, lam_x = self.conditions.split(z, unit)
        found = {"x": x, "lam_g": lam_g, "lam_x": lam_x}
        wanted = torch.is_grad_enabled() and any(value.requires_grad for value in values.values())
        if self.native is not None and wanted:
            with torch.no_grad():
                found["f"], found["g"] = self.program.values(x, values["p"])
            found = self.native.attach(values, found)
        elif {"f", "g"} & set(self.settings.outputs):
            found["f"], found["g"] = self.program.values(x, values["p"])
        results = tuple(found[name] for name in self.settings.outputs)
        return results[0] if self.settings.single else results

    def _warn_of_weakly_active(self, conditions: NlpConditions, z: Tensor, args: Sequence[Tensor]) -> None:
        """Say where a derivative will be one-sided."""
        if not z.requires_grad or inv.in_transform():
            return
        sizes = {"g": self.program.constraints, "x": self.program.unknowns}
        inv.constraints.warn_of_weakly_active(conditions.weakly_active(z, *args), sizes)


def _first_tensor(values: Sequence[Any]) -> Tensor:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors[0] if tensors else torch.empty(0, dtype=torch.float64)


def _tensor(name: str, value: Any, size: int, default: float, like: Tensor) -> Tensor:
    """``(*batch, size)``; a number stands for all entries."""
    if value is None:
        value = default
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        if value.ndim == 0:
            value = value.expand(size)
    if value.ndim == 0 or value.shape[-1] != size or not value.is_floating_point():
        raise inv.ConditionsError(
            f"CasadiLayer: {name} came with shape {tuple(value.shape)} and dtype {value.dtype}; accepted is "
            f"a real floating-point tensor of shape (*batch, {size}), or a number for all entries."
        )
    return value
