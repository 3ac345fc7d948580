"""From the user's tensors to θ, the parameter vector of the canonical form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import cvxpy as cp
import numpy as np
import torch
from cvxpy.reductions.cvx_attr2constr import CvxAttr2Constr, lower_value
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from torch import Size, Tensor

import invlayer_core as inv
from invlayer_cvxpy.canonical import CanonicalForm

__all__ = ["ParameterSlot", "Parameters", "check_complete"]

_SYMMETRIC = ("symmetric", "PSD", "NSD", "hermitian")


@final
@dataclass(frozen=True)
class ParameterSlot:
    """One block of θ: entries of one of the user's tensors, perhaps their logarithms."""

    source: int  # which of the user's parameters
    log: bool
    entries: np.ndarray  # into the flattened tensor


@final
class Parameters:
    """The user's parameters in order, and how θ is made of them.

    Parameters
    ----------
    form : CanonicalForm
    parameters : sequence of cvxpy.Parameter
    """

    def __init__(self, form: CanonicalForm, parameters: Sequence[Any]) -> None:
        self.names = [parameter.name() for parameter in parameters]
        self.shapes = [tuple(parameter.shape) for parameter in parameters]
        self.symmetric = [any(p.attributes[key] for key in _SYMMETRIC) for p in parameters]
        self.positive = [bool(p.attributes["pos"]) for p in parameters]
        origin = _origins(form, parameters)
        self.slots = [
            ParameterSlot(*origin[parameter.id], _entries(form, parameter))
            for parameter, _ in sorted(form.parameters, key=lambda pair: pair[1])
        ]

    def ordered(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
        """One tensor per parameter, from positions or from names.

        Raises
        ------
        ConditionsError
            If there are too few or too many, or one is no real tensor.
        """
        given = [*args, *(named[name] for name in self.names[len(args) :] if name in named)]
        used = set(self.names[len(args) :]) & set(named)
        if len(given) != len(self.names) or used != set(named):
            raise inv.ConditionsError(
                f"CvxpyLayer: got {len(args)} tensors{_also(named)}; accepted are {len(self.names)}, for the "
                f"parameters {', '.join(self.names)}, in this order or by these names."
            )
        for name, tensor in zip(self.names, given, strict=True):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                what = f"a tensor of dtype {tensor.dtype}" if isinstance(tensor, Tensor) else f"{tensor!r}"
                raise inv.ConditionsError(
                    f"CvxpyLayer: parameter {name} is {what}; accepted is a real floating-point "
                    "torch.Tensor. Use torch.as_tensor(value, dtype=torch.float64)."
                )
        return given

    def batches(self, tensors: Sequence[Tensor]) -> list[Size]:
        """The batch dims of every tensor.

        Raises
        ------
        ConditionsError
            If a shape does not end in that of its parameter, or batch dims do not fit together.
        """
        found = []
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            split = tensor.ndim - len(shape)
            if split < 0 or tuple(tensor.shape[split:]) != shape:
                raise inv.ConditionsError(
                    f"CvxpyLayer: parameter {name} came with shape {tuple(tensor.shape)}; accepted is "
                    f"{shape}, or {('*batch', *shape)} for a batch."
                )
            if tensor.device != tensors[0].device:
                raise inv.ConditionsError(
                    f"CvxpyLayer: parameter {name} is on {tensor.device}, {self.names[0]} on "
                    f"{tensors[0].device}; accepted is one device."
                )
            found.append(tensor.shape[:split])
        full = {batch for batch in found if batch}
        if len(full) > 1:
            listed = ", ".join(f"{n} {tuple(b)}" for n, b in zip(self.names, found, strict=True) if b)
            raise inv.ConditionsError(
                f"CvxpyLayer: the batch dims differ: {listed}. Accepted are the same for all parameters that "
                "are batched, and none for the others."
            )
        return found

    def block(self, slot: ParameterSlot, tensors: Sequence[Tensor]) -> Tensor:
        """The block of θ, ``(*batch, k)``."""
        tensor, shape = tensors[slot.source], self.shapes[slot.source]
        if self.symmetric[slot.source]:
            tensor = 0.5 * (tensor + tensor.mT)
        flat = tensor.reshape(*tensor.shape[: tensor.ndim - len(shape)], math.prod(shape))
        if not np.array_equal(slot.entries, np.arange(flat.shape[-1])):
            index = torch.from_numpy(slot.entries).to(flat.device)
            flat = flat.gather(-1, index.expand(*flat.shape[:-1], -1))
        return flat.log() if slot.log else flat


def _also(named: Mapping[str, Any]) -> str:
    return f" and the names {', '.join(named)}" if named else ""


def _origins(form: CanonicalForm, parameters: Sequence[Any]) -> dict[int, tuple[int, bool]]:
    """For each parameter of the canonical form: which of the user's it stands for, and whether as its log."""
    origin = {parameter.id: (i, False) for i, parameter in enumerate(parameters)}
    for kind, log in ((Dgp2Dcp, True), (CvxAttr2Constr, False)):
        reduction = form.reduction(kind)
        if reduction is None:
            continue
        renamed = reduction.canon_methods._parameters if log else reduction._parameters
        for old, new in renamed.items():
            source, was_log = origin[old.id]
            origin[new.id] = (source, log or was_log)
    return origin


def _entries(form: CanonicalForm, canonical: Any) -> np.ndarray:
    """Which entries of the user's flattened tensor the canonical parameter holds, in CVXPY's order."""
    reduction = form.reduction(CvxAttr2Constr)
    reduced = {} if reduction is None else {new.id: old for old, new in reduction._parameters.items()}
    full = reduced.get(canonical.id, canonical)
    index: Any = np.arange(full.size).reshape(full.shape)
    if canonical.id in reduced:
        index = lower_value(full, index)
    return np.asarray(index).flatten(order="F").astype(np.int64)


def check_complete(problem: cp.Problem, parameters: Sequence[Any], variables: Sequence[Any]) -> None:
    """Refuse lists that do not fit the problem.

    Raises
    ------
    ConditionsError
        Naming what is missing or unknown.
    """
    if not all(isinstance(p, cp.Parameter) for p in parameters):
        raise inv.ConditionsError(
            f"CvxpyLayer(parameters={list(parameters)!r}): accepted are cvxpy.Parameter."
        )
    given, needed = {p.id for p in parameters}, {p.id for p in problem.parameters()}
    missing = [p.name() for p in problem.parameters() if p.id not in given]
    foreign = [p.name() for p in parameters if p.id not in needed]
    if missing or foreign or len(given) != len(parameters):
        raise inv.ConditionsError(
            f"CvxpyLayer(parameters=...): the problem has the parameters "
            f"{', '.join(p.name() for p in problem.parameters())}; missing are {missing}, and not among them "
            f"are {foreign}. Accepted is each of them once, in the order in which the layer is called."
        )
    if not variables:
        raise inv.ConditionsError("CvxpyLayer(variables=[]): accepted is at least one variable to return.")
