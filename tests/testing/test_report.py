"""What a caller of ``check_solver`` gets to see: report, table, error, pytest class."""

import pickle
import subprocess
import sys

import pytest
from bad_adapters import StopsEarly, Unfinished
from toy_adapters import NumpyNewton, TorchNewton, spec_of

import invlayer_core as inv
from invlayer_core.testing import ConformanceError, ConformanceReport, RuleResult
from invlayer_core.testing.pytest_case import SolverConformance
from invlayer_core.testing.rules import RULES

REPORT = ConformanceReport(
    "acme.newton",
    ("root",),
    ("fixed_point",),
    (
        RuleResult("values", True, "8 problems"),
        RuleResult("claims", False, "expected success=True; came False. " + "Do this. " * 20),
        RuleResult("thread_safety", None, "thread_safe=False"),
    ),
)


def test_the_table_shows_every_outcome():
    lines = REPORT.table().splitlines()
    assert lines[0] == ("acme.newton (root; not tested: fixed_point): 1 passed, 1 broken, 1 not applicable")
    assert lines[1] == "values         passed          8 problems"
    assert lines[2].startswith("claims         broken          expected success=True; came False. Do this.")
    assert lines[-1] == "thread_safety  not applicable  thread_safe=False"
    assert max(map(len, lines)) <= 110
    assert str(REPORT) == REPORT.table()


def test_the_error_lists_what_is_broken_and_carries_the_report():
    error = ConformanceError.of(REPORT)
    assert isinstance(error, AssertionError)
    assert isinstance(error, inv.InvlayerError)
    assert str(error).splitlines()[0] == "acme.newton: 1 conformance rule is broken."
    assert "values" not in str(error)
    assert error.report is REPORT
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_kinds_left_out_are_named():
    report = inv.testing.check_solver(spec_of(TorchNewton), kinds="root")
    assert (report.kinds, report.untested) == (("root",), ("fixed_point",))


@pytest.mark.parametrize("kinds", [["minimize"], ["root", "fixed_point"], []])
def test_kinds_that_cannot_be_tested_are_refused(kinds):
    with pytest.raises(ValueError, match=r"accepted are one or more of \['root'\]"):
        inv.testing.check_solver(spec_of(TorchNewton, kinds=("root",)), kinds=kinds)


def test_what_is_no_spec_is_refused():
    with pytest.raises(TypeError, match="accepted are a SolverSpec or the name"):
        inv.testing.check_solver(NumpyNewton())
    with pytest.raises(inv.SolverNotFoundError):
        inv.testing.check_solver("acme.no_such_solver")


def test_an_adapter_that_cannot_be_made_breaks_one_rule_and_concerns_no_other():
    with pytest.raises(ConformanceError, match=r"does not define solve") as raised:
        inv.testing.check_solver(spec_of(Unfinished))
    outcomes = {result.rule: result.passed for result in raised.value.report.results}
    assert outcomes.pop("loading") is False
    assert set(outcomes.values()) == {None}


def test_a_loose_tolerance_lets_a_solver_pass_that_stops_early():
    with pytest.raises(ConformanceError) as raised:
        inv.testing.check_solver(spec_of(StopsEarly), tolerance=1e-3)
    assert [result.rule for result in raised.value.report.broken] == ["claims"]


def test_the_pytest_class_has_one_test_for_each_rule():
    tests = [name for name in dir(SolverConformance) if name.startswith("test_")]
    assert sorted(tests) == sorted(f"test_{rule.name}" for rule in RULES)
    assert all(getattr(SolverConformance, name).__doc__ for name in tests)


def test_the_pytest_class_passes_fails_and_skips():
    class Conformance(SolverConformance):
        spec = spec_of(StopsEarly)

    Conformance().test_result_fields()
    with pytest.raises(ConformanceError, match="1 conformance rule is broken"):
        Conformance().test_values()
    with pytest.raises(pytest.skip.Exception, match="not registered"):
        Conformance().test_registration()


def test_the_core_does_not_import_pytest():
    code = "import sys, invlayer_core; assert not {'pytest', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
