"""What the registration module declares, and that declaring it costs no import of CasADi."""

import json
import subprocess
import sys

import pytest

from invlayer_casadi import register_solver
from invlayer_core.solvers import SolverSpec, get_solver, get_spec, solvers

ADAPTERS = {
    "casadi.rootfinder": ("rootfinding.registered", ("root", "fixed_point")),
    "casadi.ipopt": ("nlp.registered", ("nlp", "minimize")),
    "casadi.nlpsol.ipopt": ("nlp.registered", ("nlp", "minimize")),
    "casadi.sqpmethod": ("nlp.registered", ("nlp", "minimize")),
    "casadi.nlpsol.sqpmethod": ("nlp.registered", ("nlp", "minimize")),
}


def test_registration_module_describes_its_solvers() -> None:
    assert [spec.name for spec in register_solver()] == list(ADAPTERS)


@pytest.mark.parametrize("spec", register_solver(), ids=lambda spec: spec.name)
def test_specs(spec: SolverSpec) -> None:
    module, kinds = ADAPTERS[spec.name]
    assert spec.kinds == kinds
    assert spec.requires == ("casadi>=3.6.6",)
    assert spec.install == "pip install invlayer-casadi"
    assert not spec.batched
    assert spec.bounds == spec.constraints == ("nlp" in kinds)
    (row,) = [row for row in solvers(kinds[0]) if row.name == spec.name]
    assert (row.plugin, row.status) == ("invlayer-casadi", "ok")
    assert get_spec(spec.name) in register_solver()
    assert type(get_solver(spec.name)).__module__ == f"invlayer_casadi.{module}"


def test_public_names_are_there_and_others_are_not() -> None:
    import invlayer_casadi

    for name in invlayer_casadi.__all__:
        assert getattr(invlayer_casadi, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'invlayer_casadi' has no attribute 'CasadiSolver'"):
        invlayer_casadi.CasadiSolver  # noqa: B018


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import invlayer_casadi", set()),
        (
            "from invlayer_core.solvers import solvers; assert 'casadi.ipopt' in [s.name for s in solvers()]",
            set(),
        ),
        ("from invlayer_core.solvers import get_solver; get_solver('casadi.ipopt')", {"casadi"}),
        ("from invlayer_casadi import CasadiFunction", {"casadi"}),
    ],
)  # fmt: skip
def test_casadi_is_imported_only_when_it_is_used(code: str, imported: set[str]) -> None:
    report = "import json, sys; print(json.dumps([n for n in ('cvxpy', 'casadi') if n in sys.modules]))"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)) == imported
