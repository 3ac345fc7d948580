"""What the conformance kit found: one result per rule, a table of them, and the error they make."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import final

from invlayer_core.errors import InvlayerError

__all__ = ["ConformanceError", "ConformanceReport", "RuleResult"]

_WIDTH = 110


@final
@dataclass(frozen=True)
class RuleResult:
    """What became of one rule.

    Attributes
    ----------
    rule : str
        Its name.
    passed : bool or None
        None if the rule does not apply to this solver; ``detail`` then says why.
    detail : str
        What was measured; or what was expected, what came and what to do.
    cause : BaseException or None
        What a broken rule raised.
    """

    rule: str
    passed: bool | None
    detail: str
    cause: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def outcome(self) -> str:
        """``"passed"``, ``"broken"`` or ``"not applicable"``."""
        return {True: "passed", False: "broken", None: "not applicable"}[self.passed]


@final
@dataclass(frozen=True)
class ConformanceReport:
    """What the kit found about one solver.

    Attributes
    ----------
    solver : str
        The solver's name.
    kinds : tuple of str
        The problem kinds it was tested with.
    untested : tuple of str
        Kinds that its spec declares and that were left out.
    results : tuple of RuleResult
        One for each rule, in the order in which they ran.
    """

    solver: str
    kinds: tuple[str, ...]
    untested: tuple[str, ...]
    results: tuple[RuleResult, ...]

    @property
    def broken(self) -> tuple[RuleResult, ...]:
        """The rules that the solver breaks."""
        return tuple(result for result in self.results if result.passed is False)

    def table(self) -> str:
        """One row per rule, with its outcome and detail, as text."""
        rule = max((len(result.rule) for result in self.results), default=0)
        outcome = len("not applicable")
        rows = [
            textwrap.fill(
                f"{result.rule:{rule}}  {result.outcome:{outcome}}  {result.detail}",
                _WIDTH,
                subsequent_indent=" " * (rule + outcome + 4),
                break_long_words=False,
            )
            for result in self.results
        ]
        return "\n".join([self._summary(), *rows])

    def _summary(self) -> str:
        outcomes = [result.outcome for result in self.results]
        counts = [
            f"{outcomes.count(outcome)} {outcome}"
            for outcome in ("passed", "broken", "not applicable")
            if outcome in outcomes
        ]
        untested = f"; not tested: {', '.join(self.untested)}" if self.untested else ""
        return f"{self.solver} ({', '.join(self.kinds)}{untested}): {', '.join(counts)}"

    def __str__(self) -> str:
        return self.table()


@final
class ConformanceError(InvlayerError, AssertionError):
    """A solver breaks rules of the conformance kit; the message lists all of them.

    Attributes
    ----------
    report : ConformanceReport or None
        All results, those of the rules that hold included.
    """

    def __init__(self, message: str, report: ConformanceReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    @classmethod
    def of(cls, report: ConformanceReport) -> ConformanceError:
        """The error that a report makes."""
        count = len(report.broken)
        lines = [f"  {result.rule}: {result.detail}" for result in report.broken]
        rules = "rule is" if count == 1 else "rules are"
        return cls("\n".join([f"{report.solver}: {count} conformance {rules} broken.", *lines]), report)
