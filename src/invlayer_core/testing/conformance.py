"""``check_solver``: every rule on one adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from invlayer_core.solvers import SolverSpec
from invlayer_core.testing.report import ConformanceError, ConformanceReport
from invlayer_core.testing.rules import RULES
from invlayer_core.testing.rules.cones import CONE_RULES
from invlayer_core.testing.rules.programs import PROGRAM_RULES
from invlayer_core.testing.subject import Subject

__all__ = ["check_solver"]

_OF_KIND: Final = {"qp": PROGRAM_RULES, "cone": CONE_RULES}


def check_solver(
    spec: SolverSpec | str,
    *,
    options: Mapping[str, Any] | None = None,
    kinds: Collection[str] | None = None,
    tolerance: float = 1e-6,
) -> ConformanceReport:
    """Put a solver through every rule of the conformance kit.

    Parameters
    ----------
    spec : SolverSpec or str
        A spec, registered or not, or the name of a registered solver.
    options : mapping, optional
        The solver's own options, for every solve.
    kinds : collection of str, optional
        Which of ``spec.kinds`` to test; all of them if left out.
    tolerance : float
        ``atol`` and ``rtol`` that the solver has to reach in float64. A method that stops early by design
        is tested with its own accuracy.

    Returns
    -------
    ConformanceReport
        With every rule passed or not applicable; ``.table()`` is readable text.

    Raises
    ------
    ConformanceError
        If a rule is broken. The message lists all that are: what was expected, what came, what to do.
    SolverNotFoundError, SolverConflictError
        If ``spec`` is a name that none or several plugins register.
    TypeError, ValueError
        If ``spec`` is something else, or ``kinds`` names one that the spec does not declare.

    Examples
    --------
    >>> report = check_solver("torch.newton", kinds=["root"])
    >>> [result.rule for result in report.results if result.passed is None]
    ['exceptions', 'registration']
    """
    subject = Subject.of(spec, options, kinds, tolerance)
    others = tuple(kind for kind in subject.kinds if kind not in _OF_KIND)
    of_others = replace(subject, kinds=others)
    results = tuple(rule.apply(of_others) for rule in RULES) if others else ()
    for kind, rules in _OF_KIND.items():
        if kind in subject.kinds:
            results += tuple(rule.apply(subject) for rule in rules)
    report = ConformanceReport(subject.spec.name, subject.kinds, subject.untested, results)
    if report.broken:
        raise ConformanceError.of(report) from report.broken[0].cause
    return report
