"""The conformance kit as a pytest class: one test per rule.

Import it in a test module, derive a class, and pytest finds the tests::

    from invlayer_core.testing.pytest_case import SolverConformance

    class TestMySolver(SolverConformance):
        spec = "acme.bisect"
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import pytest

from invlayer_core.solvers import SolverSpec
from invlayer_core.testing.report import ConformanceError, ConformanceReport
from invlayer_core.testing.rules import RULES
from invlayer_core.testing.rules.cones import CONE_RULES
from invlayer_core.testing.rules.programs import PROGRAM_RULES
from invlayer_core.testing.rules.rule import Rule
from invlayer_core.testing.subject import Subject

__all__ = ["ConeConformance", "ProgramConformance", "SolverConformance"]


class SolverConformance:
    """Base class of a solver's conformance tests; a subclass says which solver.

    It has one test method ``test_<rule>`` for each rule. A rule that does not apply is skipped, with the
    reason.

    Attributes
    ----------
    spec : SolverSpec or str
        A spec, registered or not, or the name of a registered solver.
    options, kinds, tolerance
        As in :func:`invlayer_core.testing.check_solver`.
    """

    spec: ClassVar[SolverSpec | str]
    options: ClassVar[Mapping[str, Any] | None] = None
    kinds: ClassVar[Collection[str] | None] = None
    tolerance: ClassVar[float] = 1e-6

    def check(self, rule: Rule) -> None:
        """Apply one rule; skip the test if it does not concern the solver.

        Raises
        ------
        ConformanceError
            If the rule is broken.
        """
        __tracebackhide__ = True
        subject = Subject.of(self.spec, self.options, self.kinds, self.tolerance)
        result = rule.apply(subject)
        if result.passed is None:
            pytest.skip(result.detail)
        if not result.passed:
            report = ConformanceReport(subject.spec.name, subject.kinds, subject.untested, (result,))
            raise ConformanceError.of(report) from result.cause


def _test_of(rule: Rule) -> Callable[[SolverConformance], None]:
    def test(self: SolverConformance) -> None:
        self.check(rule)

    test.__name__ = f"test_{rule.name}"
    test.__qualname__ = f"{SolverConformance.__qualname__}.{test.__name__}"
    test.__doc__ = rule.promise
    return test


for _rule in RULES:
    setattr(SolverConformance, f"test_{_rule.name}", _test_of(_rule))


class ProgramConformance(SolverConformance):
    """The same for a solver of quadratic programs (kind ``"qp"``), with the rules for those."""


class ConeConformance(SolverConformance):
    """The same for a solver of cone programs (kind ``"cone"``), with the rules for those."""


for _case, _rules in ((ProgramConformance, PROGRAM_RULES), (ConeConformance, CONE_RULES)):
    for _rule in RULES:
        setattr(_case, f"test_{_rule.name}", None)  # pytest collects what can be called
    for _rule in _rules:
        setattr(_case, f"test_{_rule.name}", _test_of(_rule))
