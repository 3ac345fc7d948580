"""Every example in the docstrings gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import invlayer_casadi


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [m.name for m in pkgutil.walk_packages(invlayer_casadi.__path__, "invlayer_casadi.")]
    return [t for name in names for t in finder.find(importlib.import_module(name), name) if t.examples]


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_the_examples_of_a_docstring_hold(test: doctest.DocTest) -> None:
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
