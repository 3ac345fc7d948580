"""The rule about derivatives: they agree with two oracles that know nothing of implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from invlayer_core.testing.oracles import derivatives, unrolled_newton
from invlayer_core.testing.rules.rule import Violation, rule
from invlayer_core.testing.subject import Subject
from invlayer_core.testing.zoo import Case, coupled_cubic, linear, quadratic, transcendental

__all__ = ["compare_with_differences", "compare_with_unrolled", "gradients"]

_POLISH = 2  # Newton steps that take any certified y to machine precision
_RELATIVE_ERROR = 1e-8


@rule
def gradients(subject: Subject) -> str:
    """Derivatives agree with differences of the re-solved layer and with unrolled Newton, to second order."""
    errors = []
    for kind, case in subject.each(
        linear((2,), 3), quadratic((2,)), coupled_cubic((2,), 3), transcendental((2,))
    ):
        layer = _layer(subject, case, kind)
        name = f"{case.name} as {kind}"
        compare_with_differences(layer, case.args, name)
        errors.append(compare_with_unrolled(layer, case, name))
    return (
        f"{len(errors)} problems, all args: central differences agree, unrolled Newton agrees to "
        f"{max(first for first, _ in errors):.1e} in the first and {max(second for _, second in errors):.1e} "
        "in the second derivative"
    )


def _layer(subject: Subject, case: Case, kind: str) -> Callable[..., Tensor]:
    def layer(*args: Tensor) -> Tensor:
        y, _ = subject.solve(replace(case, args=args), kind, polish=_POLISH)
        return y

    return layer


def _leaves(args: Sequence[Tensor]) -> list[Tensor]:
    return [arg.detach().clone().requires_grad_() for arg in args]


def compare_with_differences(layer: Callable[..., Tensor], args: Sequence[Tensor], name: str) -> None:
    """Refuse a layer whose first derivatives are not those of its own values, by central differences."""
    try:
        torch.autograd.gradcheck(layer, _leaves(args), eps=1e-5, atol=1e-7, rtol=1e-5)
    except GradcheckError as error:
        raise Violation(
            f"the derivative of {name} to be that of the re-solved layer, by central differences",
            str(error),
            "As derivatives come from F alone, this means that y jumps when args change a little: let the "
            "solver reach the same root from the same start.",
        ) from error


def compare_with_unrolled(layer: Callable[..., Tensor], case: Case, name: str) -> tuple[float, float]:
    """Refuse a layer whose derivatives are not those of Newton's method unrolled from its y.

    Returns
    -------
    first, second : float
        The largest relative errors.
    """
    args = _leaves(case.args)
    y = layer(*args).detach()
    found = derivatives(layer, args)
    expected = derivatives(lambda *theta: unrolled_newton(case, y, theta), args)
    errors = tuple(
        max(_relative_error(a, b) for a, b in zip(f, e, strict=True))
        for f, e in zip(found, expected, strict=True)
    )
    for order, error in zip(("first", "second"), errors, strict=True):
        if not error <= _RELATIVE_ERROR:
            raise Violation(
                f"the {order} derivative of {name} to agree with unrolled Newton to {_RELATIVE_ERROR:.0e}",
                f"a relative error of {error:.1e}",
                "Check that solve() returns a root, and that it leaves torch's own state as it was.",
            )
    return errors[0], errors[1]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
