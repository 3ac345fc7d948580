"""Checks of the values: determinism, residual, conditioning, coupling of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from invlayer_core.diagnostics.layout import Layout
from invlayer_core.diagnostics.report import CheckRow, RowVerdict
from invlayer_core.diagnostics.systems import SystemFacts
from invlayer_core.diagnostics.trial import Trial, first_line

__all__ = [
    "check_conditioning",
    "check_coupling",
    "check_determinism",
    "check_given_jacobians",
    "check_residual",
]

_NUDGE = 0.01


def relative(change: Tensor, value: Tensor) -> Tensor:
    """|change| beside the largest |value|; 0 where both are zero or NaN alike."""
    size = value.abs().nan_to_num().amax().clamp_min(torch.finfo(value.dtype).tiny) if value.numel() else 1.0
    return change.abs() / size


def check_determinism(trial: Trial) -> CheckRow:
    """The same input twice, value and gradient."""
    name = "determinism"
    again = trial.forward(trial.subject.values)
    if not bool(trial.value.isfinite().all()):
        count = int((~trial.value.isfinite()).sum())
        return CheckRow(name, "wrong", None, 0.0, f"{count} entries of the output are NaN or infinite")
    gap = relative(again - trial.value, trial.value)
    worst = float(gap.max()) if gap.numel() else 0.0
    if worst == 0.0:
        return CheckRow(name, "ok", 0.0, 0.0, "the same input twice gives the same bits")
    verdict: RowVerdict = "suspicious" if worst <= 100 * trial.eps else "wrong"
    return CheckRow(
        name, verdict, worst, 0.0, "the same input twice gives different values", *_samples(trial.layout, gap)
    )


def _samples(layout: Layout, values: Tensor) -> tuple[int | None, tuple[float, ...]]:
    """The worst sample, and one figure per sample."""
    if not layout.batch:
        return None, ()
    per_sample = layout.per_sample(values)
    return int(per_sample.argmax()), tuple(per_sample.tolist())


def check_residual(trial: Trial) -> CheckRow:
    """F(y*, θ), measured, and how far y* is from the root."""
    name = "residual"
    measured = [facts for facts in trial.systems if facts.residual is not None]
    if not measured:
        known = "F is known only by its Jacobian: its value says nothing" if trial.systems else ""
        return CheckRow(
            name, "not available", detail=known or "no implicit layer was found behind the output"
        )
    facts = max(measured, key=lambda facts: float(facts.residual.max()))  # type: ignore[union-attr]
    assert facts.residual is not None
    off = "" if facts.error is None else f"; y is off by {float(facts.error.max()):.1e} of itself (Newton)"
    row = CheckRow(
        name, "ok", float(facts.residual.max()), None, f"‖F(y)‖∞{off}", *_worst(facts.residual, facts)
    )
    if failed := _failed(trial):
        return replace(row, verdict="wrong", detail=f"failed samples: {failed}{off}")
    if trial.solver_error > trial.accurate:
        return replace(row, verdict="suspicious", detail=f"{row.detail}, more than {trial.accurate:.0e}")
    return row


def _worst(figures: Tensor, facts: SystemFacts) -> tuple[int | None, tuple[float, ...]]:
    """The sample with the largest figure, and the figures, where there are samples."""
    return (int(figures.argmax()), tuple(figures.tolist())) if facts.batch else (None, ())


def _failed(trial: Trial) -> str:
    masks = [facts.failed for facts in trial.systems if facts.failed is not None]
    if trial.info is not None:
        masks.append(~trial.info.ok.reshape(-1).cpu())
    numbers = sorted({int(i) for mask in masks for i in mask.nonzero().reshape(-1)})
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def check_conditioning(trial: Trial) -> CheckRow:
    """The condition number of J, and whether J is singular within the accuracy of y."""
    name = "conditioning of J"
    known = [facts for facts in trial.systems if facts.condition is not None]
    if not known:
        why = trial.systems[0].missing if trial.systems else "no implicit layer was found behind the output"
        return CheckRow(name, "not available", detail=" ".join(why.split())[:240])
    facts = max(known, key=lambda facts: float(facts.condition.max()))  # type: ignore[union-attr]
    assert facts.condition is not None
    assert facts.equilibrated is not None
    assert facts.singular is not None
    limit, largest = trial.eps ** (-2 / 3), float(facts.condition.max())
    what = "2-norm condition number of ∂F/∂y"
    row = CheckRow(name, "ok", largest, limit, what, *_worst(facts.condition, facts))
    if bool(facts.singular.any()):
        first = int(facts.singular.nonzero()[0])
        detail = f"J is singular within the accuracy of y{_in_sample(first, facts)}"
        return replace(row, verdict="wrong", detail=detail)
    if largest <= limit:
        return row
    better = float(facts.equilibrated.max())
    if better <= limit:
        return replace(row, detail=f"a matter of units: {better:.1e} once the rows of J have equal size")
    worst = _in_sample(int(facts.condition.argmax()), facts)
    return replace(
        row, verdict="suspicious", detail=f"J is ill-conditioned{worst}, however its rows are scaled"
    )


def _in_sample(number: int, facts: SystemFacts) -> str:
    return f" in sample {number}" if facts.batch else ""


def check_given_jacobians(trial: Trial) -> list[CheckRow]:
    """A Jacobian of residuals that the user gave, beside autograd's; no row where there is none."""
    name, limit = "given Jacobian", trial.eps**0.5
    known = [facts for facts in trial.systems if facts.given is not None]
    if not known:
        return []
    facts = max(known, key=lambda facts: float(facts.given[0].max()))  # type: ignore[index]
    assert facts.given is not None
    errors, where = facts.given
    row = CheckRow(
        name, "ok", float(errors.max()), limit, "jacobian= beside autograd's", *_worst(errors, facts)
    )
    return [row if float(errors.max()) <= limit else replace(row, verdict="wrong", detail=where)]


def check_coupling(trial: Trial, noise: float) -> CheckRow:
    """Whether a sample's value or gradient depends on another sample's input."""
    name, layout = "batch coupling", trial.layout
    if layout.count < 2:
        return CheckRow(name, "not available", detail="there is one sample")
    if not layout.batched:
        return CheckRow(name, "not available", detail="no argument has the batch dims of the output")
    rounding = 100 * max(trial.eps, noise)
    changes, failed = [], []
    for words, probe in _PROBES:
        try:
            changes.append((words, probe(trial)))
        except Exception as error:  # a probe moves the input; where the layer fails, the others tell
            failed.append(first_line(error))
    if not changes:
        return CheckRow(name, "not available", detail=failed[0])
    # The first probe that tells something; all that follow from it say it less plainly.
    words, worst = next((pair for pair in changes if float(pair[1].max()) > rounding), _largest(changes))
    largest, sample = float(worst.max()), int(worst.argmax())
    row = CheckRow(name, "ok", largest, rounding, "no bit of a sample changes with the others")
    if largest == 0.0:
        return row
    row = replace(row, sample=sample, per_sample=tuple(worst.tolist()), detail=words.format(sample, largest))
    return (
        replace(row, detail=f"at rounding level: {row.detail}")
        if largest <= rounding
        else replace(row, verdict="suspicious")
    )


def _largest(changes: Sequence[tuple[str, Tensor]]) -> tuple[str, Tensor]:
    return max(changes, key=lambda pair: float(pair[1].max()))


def _replace_slices(trial: Trial, change: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """The inputs, with ``change`` applied to every batched one as ``(B, ...)``."""
    values = trial.subject.values
    for i in trial.layout.batched:
        flat = values[i].reshape(trial.layout.count, -1)
        values[i] = change(i, flat.clone()).reshape(values[i].shape)
    return values


def _one_moved(trial: Trial) -> list[Tensor]:
    def move(i: int, flat: Tensor) -> Tensor:
        flat[-1] += _NUDGE * trial.directions.tangents[0][i].reshape(trial.layout.count, -1)[-1]
        return flat

    return _replace_slices(trial, move)


def _sample_change(trial: Trial, moved: Tensor, kept: Sequence[int]) -> Tensor:
    size = trial.layout.per_sample(trial.value.abs())
    size = size + 1e-8 * size.max() + 1e-300
    change = trial.layout.per_sample((moved - trial.value).abs()) / size
    mask = torch.zeros_like(change)
    mask[list(kept)] = 1.0
    return change * mask


def _value_when_one_moves(trial: Trial) -> Tensor:
    return _sample_change(trial, trial.forward(_one_moved(trial)), range(trial.layout.count - 1))


def _value_when_others_permute(trial: Trial) -> Tensor:
    permuted = _replace_slices(trial, lambda _, flat: torch.cat([flat[:1], flat[1:].roll(1, 0)]))
    return _sample_change(trial, trial.forward(permuted), [0])


def _gradient_when_one_moves(trial: Trial) -> Tensor:
    cotangent = trial.directions.cotangents[:1]
    (before,) = trial.pullbacks(trial.subject.values, cotangent)
    (after,) = trial.pullbacks(_one_moved(trial), cotangent)
    change = _largest_slices(trial, [b - a for a, b in zip(before, after, strict=True)])
    change = change / _largest_slices(trial, before).clamp_min(1e-300)
    return torch.cat([change[:-1], change.new_zeros(1)])


def _gradient_of_one(trial: Trial) -> Tensor:
    """Pull a cotangent of sample 0 back: what arrives at the inputs of others, beside its own."""
    cotangent = trial.directions.cotangents[0] * (trial.layout.owner == 0)
    (pulled,) = trial.pullbacks(trial.subject.values, [cotangent])
    arrived = _largest_slices(trial, pulled)
    leaked = arrived[1:].max() / arrived.max().clamp_min(1e-300)
    return torch.cat([leaked.reshape(1), torch.zeros_like(arrived[1:])])


def _largest_slices(trial: Trial, tensors: Sequence[Tensor]) -> Tensor:
    """The largest entry per sample of the batched ones among ``tensors``, ``(B,)``."""
    rows = [
        tensors[i].detach().to("cpu", torch.float64).reshape(trial.layout.count, -1)
        for i in trial.layout.batched
    ]
    return torch.cat(rows, -1).abs().amax(-1)


_PROBES: list[tuple[str, Callable[[Trial], Tensor]]] = [
    ("sample {} changes by {:.0e} when the last one moves", _value_when_one_moves),
    ("sample {} changes by {:.0e} when the others change places", _value_when_others_permute),
    ("the gradient of sample {} changes by {:.0e} when the last one moves", _gradient_when_one_moves),
    ("a cotangent of sample {} alone reaches the others' inputs, by {:.0e}", _gradient_of_one),
]
