"""Every example in the core's docstrings gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import invlayer_core

PLUGINS = sorted(
    path.parent.name for path in (Path(__file__).parents[2] / "plugins").glob("*/pyproject.toml")
)


def examples() -> list[object]:
    """One parameter for each docstring that has examples, marked with the plugins whose library it names."""
    modules = [invlayer_core.__name__] + [
        module.name
        for module in pkgutil.walk_packages(invlayer_core.__path__, f"{invlayer_core.__name__}.")
        if not module.name.endswith(".__main__")
    ]
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test for name in modules for test in finder.find(importlib.import_module(name), name) if test.examples
    ]
    return [
        pytest.param(
            test,
            id=test.name,
            marks=[
                pytest.mark.plugin(plugin)
                for plugin in PLUGINS
                if re.search(
                    rf"\b{plugin.removeprefix('invlayer-')}\b", "".join(e.source for e in test.examples)
                )
            ],
        )
        for test in found
    ]


@pytest.mark.parametrize("test", examples())
def test_the_examples_of_a_docstring_hold(test: doctest.DocTest):
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
