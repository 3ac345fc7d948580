"""What a rule is: a function of the adapter under test that says what it measured, or raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from invlayer_core.testing.report import RuleResult
from invlayer_core.testing.subject import NotApplicable, Subject

__all__ = ["Rule", "Violation", "rule"]


@final
class Violation(AssertionError):  # noqa: N818 (it is a finding)
    """A rule is broken.

    Parameters
    ----------
    expected, came, remedy : str
        Phrases; the last is a sentence on what to do.
    """

    def __init__(self, expected: str, came: str, remedy: str) -> None:
        super().__init__(f"expected {expected}; came {came.rstrip('.')}. {remedy}")


@final
@dataclass(frozen=True)
class Rule:
    """One promise that every solver makes, and how it is checked.

    Attributes
    ----------
    name : str
    promise : str
        In one sentence.
    check : callable
        Takes a :class:`Subject` and returns what it measured; raises :class:`Violation` or
        ``NotApplicable``.
    """

    name: str
    promise: str
    check: Callable[[Subject], str]

    def apply(self, subject: Subject) -> RuleResult:
        """Check a solver; whatever it raises becomes part of the result."""
        try:
            return RuleResult(self.name, True, self.check(subject))
        except NotApplicable as reason:
            return RuleResult(self.name, None, str(reason))
        except Violation as violation:
            return RuleResult(self.name, False, str(violation), violation)
        except Exception as error:
            detail = (
                f"expected: {self.promise} Came {type(error).__name__}: {error}. "
                "The traceback, in this error's cause, shows where."
            )
            return RuleResult(self.name, False, detail, error)


def rule(check: Callable[[Subject], str]) -> Rule:
    """Make a rule of a function: its name is the rule's, its docstring's first line the promise."""
    assert check.__doc__ is not None
    return Rule(check.__name__, check.__doc__.splitlines()[0], check)
