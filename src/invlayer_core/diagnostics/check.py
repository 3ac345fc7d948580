"""``check_layer``: measure what a gradient depends on, and say which of it is the limit."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from invlayer_core.call import name_of
from invlayer_core.diagnostics.derivatives import Derivatives, first_order_curves
from invlayer_core.diagnostics.first_order import check_first_order, check_noise
from invlayer_core.diagnostics.forward_checks import (
    check_conditioning,
    check_coupling,
    check_determinism,
    check_given_jacobians,
    check_residual,
)
from invlayer_core.diagnostics.limit import limiting_factor
from invlayer_core.diagnostics.report import CheckRow, LayerReport
from invlayer_core.diagnostics.second_order import check_second_order
from invlayer_core.diagnostics.subject import Subject
from invlayer_core.diagnostics.trial import Trial, first_line
from invlayer_core.errors import ConvergenceError, ConvergenceWarning, PerformanceWarning
from invlayer_core.layers import LAYERS_WITH_GUESS, InverseLayer

__all__ = ["check_layer"]


def check_layer(layer: Callable[..., Any], /, *args: Any, **kwargs: Any) -> LayerReport:
    """Measure whether a layer's derivatives are right at one point, and what limits them.

    Residual, forward noise, conditioning and coupling of samples; VJP, JVP and double backward against each
    other and against finite differences whose step is matched to the noise of the forward. Directions are
    fixed, and the caller's tensors, ``.grad`` fields, buffers and random generators stay as they are. Costs
    between one and two hundred calls of the layer.

    Parameters
    ----------
    layer : callable
        A layer, a function decorated with :func:`~invlayer_core.implicit_function`, or any callable of
        tensors that returns a tensor, a pytree of tensors, or ``(tensor, info)``.
    *args, **kwargs
        What it is called with. Differentiated by: the floating-point tensors that require grad (all
        of them, if none does), and the parameters of the modules that the layer is or uses.

    Returns
    -------
    LayerReport
        ``print(report)`` is a table; ``report.ok``, ``report.rows`` and ``report.limit`` are for code.

    Raises
    ------
    ConditionsError
        If there is nothing to differentiate, or no floating-point tensor comes back.

    Notes
    -----
    Noise: J. J. Moré & S. M. Wild, *Estimating computational noise*, SIAM J. Sci. Comput. 33, 2011. Step: by
    the same, *Estimating derivatives of noisy simulations*, ACM TOMS 38, 2012.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> layer = inv.RootLayer(lambda y, a: y**3 + y - a)
    >>> a = torch.tensor([[2.0], [10.0]], dtype=torch.float64)
    >>> report = inv.check_layer(layer, a, y0=torch.zeros_like(a))
    >>> report.ok
    True
    >>> report.row("VJP vs finite differences").verdict
    'ok'
    """
    with _untouched():
        subject = Subject(_with_info(layer), args, kwargs)
        name = _describe(layer)
        names = tuple(item.name for item in subject.inputs)
        try:
            trial = Trial.start(subject)
        except ConvergenceError as error:
            return _failed_report(name, names, error)
        return _examine(name, names, trial)


def _examine(name: str, names: tuple[str, ...], trial: Trial) -> LayerReport:
    found = Derivatives.take(trial)
    second, curves = check_second_order(found)
    rows = (
        check_determinism(trial),
        check_residual(trial),
        *check_given_jacobians(trial),
        check_conditioning(trial),
        check_coupling(trial, found.noise),
        check_noise(found),
        *check_first_order(found),
        *second,
    )
    return LayerReport(
        layer=name,
        inputs=names,
        batch=tuple(trial.layout.batch),
        systems=tuple(facts.label for facts in trial.systems),
        rows=rows,
        limit=limiting_factor(trial, rows, found.uncertainty),
        curves=(*first_order_curves(found), *curves),
        notes=tuple(_notes(trial)),
    )


def _notes(trial: Trial) -> Iterator[str]:
    if trial.left_out:
        yield f"{trial.left_out} of the outputs carry no gradient and were not checked."
    if trial.strangers:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in trial.strangers[:5])
        yield (
            f"the output also depends on {len(trial.strangers)} captured tensors that require grad (shapes "
            f"{shapes}); their gradients were not checked. Pass them as arguments to have them checked."
        )
    if trial.layout.ambiguous:
        unclear = ", ".join(trial.subject.inputs[i].name for i in trial.layout.ambiguous)
        yield f"{unclear} may be shared or one per sample (B = n): left out of the coupling probe."


def _failed_report(name: str, names: tuple[str, ...], error: ConvergenceError) -> LayerReport:
    """What can be said where the solver fails at the point itself."""
    value, sample, per_sample = None, None, ()
    if error.info is not None and error.info.residual.numel():
        residual = error.info.residual.reshape(-1).double().cpu()
        value, sample = (
            float(residual.nan_to_num(torch.inf).max()),
            int(residual.nan_to_num(torch.inf).argmax()),
        )
        per_sample = tuple(residual.tolist())
    row = CheckRow("residual", "wrong", value, None, first_line(error), sample, per_sample)
    limit = f"the solver fails at this very point, so that nothing else can be measured: {first_line(error)}"
    return LayerReport(name, names, (), (), (row,), limit)


def _describe(layer: Callable[..., Any]) -> str:
    if isinstance(layer, LAYERS_WITH_GUESS):
        solver = layer.solver if isinstance(layer.solver, str) else name_of(layer.solver)
        return f"{type(layer).__name__}(solver={solver!r})"
    if isinstance(layer, torch.nn.Module):
        return type(layer).__name__
    owner = getattr(layer, "__self__", None)
    return f"{owner.__name__}.{layer.__name__}" if isinstance(owner, type) else name_of(layer)


def _with_info(layer: Callable[..., Any]) -> Callable[..., Any]:
    """One of our layers, asked for its ``SolveInfo``; the caller's own stays as it is."""
    if not isinstance(layer, (*LAYERS_WITH_GUESS, InverseLayer)):
        return layer
    asked = copy.copy(layer)
    asked.keywords = {**layer.keywords, "return_info": True}
    return asked


@contextmanager
def _untouched() -> Iterator[None]:
    """Leave random generators as they are, modes of torch out, and warnings of failing samples unsaid."""
    with ExitStack() as stack:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        for category in (ConvergenceWarning, PerformanceWarning):
            warnings.simplefilter("ignore", category)
        yield
