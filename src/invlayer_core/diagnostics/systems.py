"""The implicit layers behind an output: how well their conditions hold, and how well J can be solved with.

A solution that :class:`~invlayer_core.adjoints.Implicit` attached carries its system in its graph node, so
layers are found wherever they are: closures and networks hide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.adjoints.rule import ImplicitRule
from invlayer_core.call import name_of
from invlayer_core.errors import InvlayerError
from invlayer_core.jacobians.linearize import linearize
from invlayer_core.jacobians.per_sample import per_sample_blocks
from invlayer_core.jacobians.verification import given_and_taken, jacobian_errors, wrong_entry
from invlayer_core.linear.singular import diagnose

__all__ = ["SystemFacts", "examine_systems", "leaves_behind"]

_LARGEST = 2**26  # entries of J that are formed for the sake of its singular values


@final
@dataclass(frozen=True)
class SystemFacts:
    """One implicit layer at its solution; tensors have one entry per sample, on the host.

    Attributes
    ----------
    label : str
        Conditions, sizes, adjoint, linear solver.
    batch : torch.Size
    residual : Tensor or None
        ‖F(y)‖∞; None if F is known only by its Jacobian.
    error : Tensor or None
        ‖J⁻¹F‖∞ / ‖y‖∞: how far y is from the root, relatively, by one Newton step.
    condition : Tensor or None
        The 2-norm condition number of J.
    equilibrated : Tensor or None
        The same after the rows of J have been scaled to equal size.
    singular : Tensor of bool or None
        Samples whose J is singular within the accuracy of y.
    failed : Tensor of bool or None
        Samples that a failure policy answered for.
    missing : str
        Why condition and error are None.
    given : tuple of (Tensor, str), or None
        Of a Jacobian of residuals that the user gave: the relative error of each sample, and where it is
        largest.
    """

    label: str
    batch: torch.Size
    residual: Tensor | None
    error: Tensor | None
    condition: Tensor | None
    equilibrated: Tensor | None
    singular: Tensor | None
    failed: Tensor | None
    missing: str
    given: tuple[Tensor, str] | None = None


def examine_systems(outputs: Sequence[Tensor]) -> list[SystemFacts]:
    """Every implicit layer behind ``outputs``, the nearest first. Their graph must still be alive."""
    return [
        _examine(node) for node in _nodes(outputs) if isinstance(getattr(node, "rule", None), ImplicitRule)
    ]


def leaves_behind(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that require grad and that ``outputs`` depend on."""
    return [node.variable for node in _nodes(outputs) if hasattr(node, "variable")]


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The graph behind tensors, breadth first."""
    queue = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(queue)
    for node in queue:
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                queue.append(parent)


def _examine(node: Any) -> SystemFacts:
    return replace(_facts(node), given=_given_jacobian(node))


def _given_jacobian(node: Any) -> tuple[Tensor, str] | None:
    system = node.rule.system
    if "residuals_jacobian" not in system.parts:
        return None
    y, _, *theta = node.saved_tensors
    given, taken = given_and_taken(system, "residuals", "residuals_jacobian", y, theta)
    return _host(jacobian_errors(given, taken)), wrong_entry(given, taken)


def _facts(node: Any) -> SystemFacts:
    rule: ImplicitRule = node.rule
    y, dead, *theta = node.saved_tensors
    shape = rule.system.shape
    method = rule.settings.method(shape, y.dtype)
    label = (
        f"conditions {name_of(_users_function(rule.system.function))!r}: {shape.count} × {shape.size} "
        f"unknowns, singular={rule.settings.singular!r}, solved by {rule.settings.describe(shape, y.dtype)}"
    )
    failed = None if dead is None else _host(dead.reshape(-1)).bool()
    linearization = linearize(rule.system, y.detach(), [tensor.detach() for tensor in theta])
    flat = linearization.value.detach().reshape(shape.count, -1)
    residual = None if not rule.system.measurable else _host(flat.abs().amax(-1))
    missing = _why_no_jacobian(method.matrix_free, shape.count * shape.size**2, flat.shape[-1] == shape.size)
    if missing:
        return SystemFacts(label, shape.batch, residual, None, None, None, None, failed, missing)
    try:
        blocks = per_sample_blocks(linearization, check=True).detach()
    except InvlayerError as error:
        return SystemFacts(label, shape.batch, residual, None, None, None, None, failed, str(error))

    def jacobian_at(point: Tensor) -> Tensor:
        moved = linearize(rule.system, point.reshape(shape.full), [tensor.detach() for tensor in theta])
        return per_sample_blocks(moved).detach()

    vectors = y.detach().reshape(shape.count, shape.size)
    diagnosis = diagnose(blocks, vectors, flat, torch.zeros_like(flat), jacobian_at)
    step = torch.linalg.pinv(blocks, rtol=0.0) @ flat.unsqueeze(-1)
    relative = step.squeeze(-1).abs().amax(-1) / vectors.abs().amax(-1).clamp_min(torch.finfo(y.dtype).tiny)
    rows = blocks.abs().amax(-1, keepdim=True)
    singular_values = torch.linalg.svdvals(blocks / torch.where(rows > 0, rows, torch.ones_like(rows)))
    return SystemFacts(
        label, shape.batch, residual,
        None if not rule.system.measurable else _host(relative.nan_to_num(torch.inf)),
        _host(diagnosis.condition),
        _host((singular_values[..., 0] / singular_values[..., -1]).nan_to_num(torch.inf)),
        _host(diagnosis.singular).bool(),
        failed,
        "",
    )  # fmt: skip


def _why_no_jacobian(matrix_free: bool, entries: int, square: bool) -> str:
    if matrix_free:
        return "J is not formed by a Krylov method; linear_solver=inv.linear.LU() would show it"
    if entries > _LARGEST:
        return f"J has {entries} entries, more than the {_LARGEST} whose singular values are taken"
    return "" if square else "J is not square"


def _users_function(function: Any) -> Any:
    """The function that the user wrote, inside conditions that wrap it."""
    return getattr(function, "function", function)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
