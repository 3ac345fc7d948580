"""What the registration module declares, and that declaring it costs no import of SciPy."""

import json
import subprocess
import sys

import pytest

from invlayer_core.solvers import SolverSpec, get_solver, get_spec, solvers
from invlayer_scipy import register_solver

NAMES = ("scipy.fsolve", "scipy.root")


def test_registration_module_describes_its_solvers() -> None:
    assert [spec.name for spec in register_solver()] == list(NAMES)


@pytest.mark.parametrize("spec", register_solver(), ids=lambda spec: spec.name)
def test_specs(spec: SolverSpec) -> None:
    assert spec.kinds == ("root", "fixed_point")
    assert spec.requires == ("scipy>=1.11",)
    assert spec.install == "pip install invlayer-scipy"
    assert not spec.batched


@pytest.mark.parametrize("name", NAMES)
def test_installed_plugin_is_discovered(name: str) -> None:
    (row,) = [row for row in solvers("root") if row.name == name]
    assert (row.plugin, row.status) == ("invlayer-scipy", "ok")
    assert get_spec(name) in register_solver()
    assert type(get_solver(name)).__module__ == "invlayer_scipy.root"


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import invlayer_scipy", set()),
        (
            "from invlayer_core.solvers import solvers; assert 'scipy.root' in [s.name for s in solvers()]",
            set(),
        ),
        ("from invlayer_core.solvers import get_solver; get_solver('scipy.fsolve')", {"scipy"}),
    ],
)
def test_scipy_is_imported_only_when_a_solver_is_used(code: str, imported: set[str]) -> None:
    report = (
        "import json, sys; print(json.dumps([n for n in ('scipy', 'cvxpy', 'casadi') if n in sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)) == imported
