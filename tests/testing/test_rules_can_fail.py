"""Every rule reports the adapter that breaks it, and lets one pass that does not."""

from collections import Counter

import numpy as np
import pytest
from bad_adapters import BREAKS, AlwaysClaimsSuccess, StopsEarly
from toy_adapters import NumpyNewton, Picard, TorchNewton, spec_of

import invlayer_core as inv
from invlayer_core.testing.rules import RULES
from invlayer_core.testing.rules.rule import Violation
from invlayer_core.testing.subject import Subject

BY_NAME = {rule.name: rule for rule in RULES}
NEVER_APPLIES = {"registration"}  # to a spec that no distribution registers; see test_registration_rule.py


@pytest.fixture(autouse=True)
def _restored_numpy_state():
    state, errors = np.random.get_state(), np.geterr()
    yield
    np.random.set_state(state)
    np.seterr(**errors)


def subject_of(spec, options=None):
    return Subject.of(spec, options, None, 1e-6)


@pytest.mark.parametrize(
    ("rule", "spec"), BREAKS, ids=[f"{rule}-{spec.factory.rpartition(':')[2]}" for rule, spec in BREAKS]
)
def test_a_bad_adapter_breaks_its_rule(rule, spec):
    options = {"xtol": 1e-9} if spec.factory.endswith(":PopsOptions") else None
    result = BY_NAME[rule].apply(subject_of(spec, options))
    assert result.passed is False
    assert type(result.cause) is Violation, result.detail


def test_every_rule_has_a_bad_adapter():
    assert {rule for rule, _ in BREAKS} | NEVER_APPLIES == set(BY_NAME)


@pytest.mark.parametrize("solver", [NumpyNewton, TorchNewton, Picard])
def test_good_adapters_pass(solver):
    kinds = ("fixed_point",) if solver is Picard else ("root", "fixed_point")
    report = inv.testing.check_solver(spec_of(solver, kinds=kinds))
    assert not report.broken
    inapplicable = {result.rule for result in report.results if result.passed is None}
    assert inapplicable == NEVER_APPLIES | ({"exceptions"} if solver.batched else set())


def test_a_claim_where_there_is_no_root_is_mentioned():
    """Some methods cannot know: least squares calls every stationary point a success."""
    result = BY_NAME["claims"].apply(subject_of(spec_of(AlwaysClaimsSuccess)))
    assert result.passed is True
    assert "it claims a root of y² = −b (root, fixed_point)" in result.detail
    assert (
        BY_NAME["no_root"]
        .apply(subject_of(spec_of(AlwaysClaimsSuccess)))
        .detail.startswith("the sample is FALSE_CONVERGENCE")
    )


def test_one_error_lists_every_broken_rule():
    with pytest.raises(inv.testing.ConformanceError) as raised:
        inv.testing.check_solver(spec_of(StopsEarly))
    broken = Counter(result.rule for result in raised.value.report.broken)
    assert {"values", "dtype", "shapes"} <= set(broken)
    for rule in broken:
        assert f"\n  {rule}: expected" in str(raised.value)


def test_mistakes_are_told_apart():
    """An adapter with one mistake breaks few rules."""
    (spec,) = [spec for _, spec in BREAKS if spec.factory.endswith(":ReturnsExitCode")]
    with pytest.raises(inv.testing.ConformanceError) as raised:
        inv.testing.check_solver(spec)
    assert [result.rule for result in raised.value.report.broken] == ["result_fields"]
