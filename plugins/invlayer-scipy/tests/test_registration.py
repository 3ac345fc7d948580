"""What the registration module declares, and that declaring it costs no import of SciPy."""

import json
import subprocess
import sys

import pytest

from invlayer_core.solvers import SolverSpec, get_solver, get_spec, solvers
from invlayer_scipy import register_solver

ADAPTERS = {
    "scipy.fsolve": "root",
    "scipy.root": "root",
    "scipy.newton": "scalar",
    "scipy.brentq": "scalar",
    "scipy.brenth": "scalar",
    "scipy.ridder": "scalar",
    "scipy.bisect": "scalar",
    "scipy.toms748": "scalar",
    "scipy.find_root": "elementwise",
    "scipy.fixed_point": "fixed_point",
    "scipy.solve_ivp": "steady_state",
    "scipy.minimize": "minimize",
    "scipy.minimize_scalar": "minimize",
    "scipy.least_squares": "least_squares",
    "scipy.linprog": "programs",
    "scipy.milp": "programs",
}
KINDS = {
    "scipy.fixed_point": ("fixed_point",),
    "scipy.solve_ivp": ("fixed_point",),
    "scipy.minimize": ("minimize", "nlp"),
    "scipy.minimize_scalar": ("minimize",),
    "scipy.least_squares": ("least_squares",),
    "scipy.linprog": ("qp",),
    "scipy.milp": ("qp",),
}
REQUIRES = {"scipy.find_root": "scipy>=1.15", "scipy.minimize": "scipy>=1.16"}


def test_registration_module_describes_its_solvers() -> None:
    assert [spec.name for spec in register_solver()] == list(ADAPTERS)


@pytest.mark.parametrize("spec", register_solver(), ids=lambda spec: spec.name)
def test_specs(spec: SolverSpec) -> None:
    assert spec.kinds == KINDS.get(spec.name, ("root", "fixed_point"))
    assert spec.requires == (REQUIRES.get(spec.name, "scipy>=1.11"),)
    assert spec.install == "pip install invlayer-scipy"
    assert spec.batched == (spec.name == "scipy.find_root")
    scalar = ADAPTERS[spec.name] in ("scalar", "elementwise")
    assert spec.scalar == (scalar or spec.name == "scipy.minimize_scalar")
    assert spec.bracket == (scalar and spec.name not in ("scipy.newton", "scipy.find_root"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_installed_plugin_is_discovered(name: str) -> None:
    (row,) = [row for row in solvers() if row.name == name]
    assert (row.plugin, row.status) == ("invlayer-scipy", "ok")
    assert get_spec(name) in register_solver()
    assert type(get_solver(name)).__module__ == f"invlayer_scipy.{ADAPTERS[name]}"


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
