"""The conformance kit: whether a solver keeps what its spec promises.

``check_solver(spec)`` puts an adapter through every rule and returns a report, or raises one error with all
that is broken. :class:`invlayer_core.testing.pytest_case.SolverConformance` does the same as a test class,
one test per rule; it is not imported here, because it needs pytest.
"""

from invlayer_core.testing.conformance import check_solver
from invlayer_core.testing.report import ConformanceError, ConformanceReport, RuleResult

__all__ = ["ConformanceError", "ConformanceReport", "RuleResult", "check_solver"]
