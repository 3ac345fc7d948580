"""The oracles see wrong derivatives, and the zoo is what it says it is."""

import pytest
import torch

from invlayer_core.testing import zoo
from invlayer_core.testing.oracles import derivatives, nearest_root, unrolled_newton
from invlayer_core.testing.rules.gradients import compare_with_differences, compare_with_unrolled
from invlayer_core.testing.rules.rule import Violation

CASE = zoo.quadratic()
REGULAR = pytest.mark.parametrize("case", zoo.regular_cases(), ids=lambda case: case.name)


def closed_form(b):
    return (1 + b).sqrt() - 1


def test_a_right_layer_passes_both_comparisons():
    compare_with_differences(closed_form, CASE.args, CASE.name)
    first, second = compare_with_unrolled(closed_form, CASE, CASE.name)
    assert max(first, second) < 1e-13


def test_differences_see_a_wrong_derivative():
    with pytest.raises(Violation, match="derivative of quadratic to be that of the re-solved layer"):
        compare_with_differences(lambda b: 2 * closed_form(b) - closed_form(b).detach(), CASE.args, CASE.name)


def test_differences_see_a_jump():
    with pytest.raises(Violation, match="y jumps when args change a little"):
        compare_with_differences(lambda b: closed_form(b) + (b > CASE.args[0]), CASE.args, CASE.name)


def test_unrolled_newton_sees_a_wrong_first_derivative():
    with pytest.raises(Violation, match="the first derivative of quadratic"):
        compare_with_unrolled(lambda b: 2 * closed_form(b) - closed_form(b).detach(), CASE, CASE.name)


def test_unrolled_newton_sees_a_wrong_second_derivative():
    """One Newton step has the right first derivative only."""
    root = closed_form(*CASE.args)
    with pytest.raises(Violation, match="the second derivative of quadratic"):
        compare_with_unrolled(lambda b: unrolled_newton(CASE, root, (b,), steps=1), CASE, CASE.name)


def test_unrolled_newton_is_right_to_second_order():
    args = [arg.clone().requires_grad_() for arg in CASE.args]
    root = closed_form(*CASE.args)
    found = derivatives(lambda b: unrolled_newton(CASE, root, (b,)), args)
    for a, b in zip(found, derivatives(closed_form, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@REGULAR
def test_regular_systems_are_well_conditioned_at_their_root(case):
    root = nearest_root(case, case.start)
    assert float(case.function(root, *case.args).abs().max()) < 1e-14
    for i in range(len(root)):
        row = case.select(i)
        J = torch.func.jacrev(row.function)(root[i], *row.args)
        assert float(torch.linalg.cond(J)) < 10
        T = torch.eye(len(J), dtype=J.dtype) - case.relaxation * J
        assert float(torch.linalg.eigvals(T).abs().max()) < 0.8


@REGULAR
def test_cases_are_the_same_every_time(case):
    (again,) = [other for other in zoo.regular_cases() if other.name == case.name]
    assert all(torch.equal(a, b) for a, b in zip(case.args, again.args, strict=True))


def test_a_shifted_square_has_no_root():
    case = zoo.square().shifted(-2.5, index=1)
    assert bool((case.args[0][1] < 0).all())
    assert bool((case.args[0][[0, 2, 3]] > 0).all())
