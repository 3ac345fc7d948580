"""What may be imported when: solver libraries only when one of their solvers is used."""

import json
import subprocess
import sys

import pytest

LIBRARIES = {"scipy", "cvxpy", "casadi"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after ``code``."""
    report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import invlayer_core",
        "import invlayer_core.solvers",
        "from invlayer_core.solvers import solvers; assert solvers()",
        "from invlayer_core.__main__ import main; main(['solvers'])",
    ],
)
def test_listing_imports_no_solver_library(code: str) -> None:
    assert not modules_after(code) & LIBRARIES


def test_the_probe_sees_an_import() -> None:
    assert "json" in modules_after("import json")
    assert "this_is_not_imported" not in modules_after("")


def test_importing_the_core_loads_no_plugin() -> None:
    code = (
        "import sys, invlayer_core, invlayer_core.solvers.registry\n"
        "registry = sys.modules['invlayer_core.solvers.registry']\n"
        "assert registry._process_registry is None\n"
        "assert 'invlayer_core.native' not in sys.modules"
    )
    assert not modules_after(code) & LIBRARIES
