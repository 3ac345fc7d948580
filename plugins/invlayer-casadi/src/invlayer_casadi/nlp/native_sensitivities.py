"""CasADi's own sensitivities of an nlpsol Function, with their traps closed.

A constraint is active for CasADi if its multiplier exceeds ``min_lam``. By default that is 0: an interior-
point solution then has every constraint active, and the linear system is singular or, worse, is not. With
``min_lam`` the sensitivity is right for constraints whose multiplier is on one side of it and whose slack is
on the other; where both are small the answer would be silently that without the constraint, and here is an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import casadi as ca
import torch
from torch import Tensor

from invlayer_casadi.expressions.expression import Expression
from invlayer_core import ConditionsError, UnsupportedTransformError, in_transform

__all__ = ["MIN_LAM", "NativeSensitivities", "native_options"]

MIN_LAM: Final = 1e-6
_INPUTS: Final = ("x0", "p", "lbx", "ubx", "lbg", "ubg", "lam_x0", "lam_g0")
_NEAR: Final = 1e-6  # slack, beside the size of the bound, of a constraint that holds with equality


def native_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of ``casadi.nlpsol`` for its sensitivities.

    Raises
    ------
    ConditionsError
        If they cannot be right with an option.
    """
    settings = {"min_lam": MIN_LAM, **(options or {})}
    if settings.get("detect_simple_bounds") or not settings["min_lam"] > 0:
        raise ConditionsError(
            f"CasadiLayer(backend='native', options={dict(options or {})!r}): CasADi's sensitivities are "
            "wrong with min_lam=0, and after detect_simple_bounds; accepted are a positive min_lam and no "
            "detect_simple_bounds, or backend='auto'."
        )
    return settings


@final
class NativeSensitivities:
    """The derivatives of ``casadi.nlpsol`` at a solution that is known.

    Parameters
    ----------
    function : casadi.Function
    min_lam : float
    """

    def __init__(self, function: ca.Function, min_lam: float) -> None:
        self.function, self.min_lam = function, min_lam
        self._expression = Expression(function, "casadi", "raise")
        self._expression.one_by_one = True

    def attach(self, values: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, differentiable by the inputs.

        Parameters
        ----------
        values : mapping
            The inputs of ``casadi.nlpsol``, ``(*batch, k)``.
        found : mapping
            ``x, f, g, lam_x, lam_g`` without gradient, ``(*batch, k)``.

        Raises
        ------
        ConditionsError
            If a constraint that holds with equality has a multiplier too small for CasADi to see it.
        UnsupportedTransformError
            Under ``torch.func``.
        """
        if in_transform():
            raise UnsupportedTransformError(
                "CasadiLayer(backend='native') under a torch.func transform: accepted is autograd, or "
                "backend='auto', whose derivatives take every transform."
            )
        self._check(values, found)
        batch = found["x"].shape[:-1]
        inputs = [values[name].expand(*batch, -1).double() for name in _INPUTS]
        names = [self.function.name_out(i) for i in range(self.function.n_out())]
        blank = {"lam_p": torch.zeros_like(values["p"].detach().expand(*batch, -1))}
        flat = [
            ({**blank, **found})[name].detach().double().reshape(batch.numel(), -1).contiguous()
            for name in names
        ]
        outputs = self._expression.with_outputs(flat)(*inputs)
        dtype = found["x"].dtype
        return {name: output.to(dtype) for name, output in zip(names, outputs, strict=True) if name in found}

    def _check(self, values: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        for name in ("x", "g"):
            c, multiplier = found[name].detach(), found[f"lam_{name}"].detach().abs()
            lower, upper = (
                values[f"lb{name}"].detach().expand_as(c),
                values[f"ub{name}"].detach().expand_as(c),
            )
            slack = torch.minimum(c - lower, upper - c).abs()
            unseen = (slack <= _NEAR * (1.0 + c.abs())) & (multiplier <= self.min_lam)
            if bool(unseen.any()):
                sample, row = unseen.reshape(-1, unseen.shape[-1]).nonzero()[0].tolist()
                size = float(multiplier.reshape(-1, multiplier.shape[-1])[sample, row])
                raise ConditionsError(
                    f"CasadiLayer(backend='native'): constraint {name}[{row}] of sample {sample} holds with "
                    f"equality, and its multiplier {size:.1e} is below min_lam={self.min_lam:.1e}: CasADi "
                    "would silently leave it out of the derivative. Accepted are multipliers above min_lam "
                    "(scale the objective), or backend='auto'."
                )
