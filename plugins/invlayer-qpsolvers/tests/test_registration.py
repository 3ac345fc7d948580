"""What the registration module declares, and that declaring it costs no import of qpsolvers."""

import json
import subprocess
import sys

import pytest
import qpsolvers

import invlayer_core as inv
from invlayer_core.solvers import SolverSpec
from invlayer_qpsolvers import register_solver


@pytest.mark.parametrize("spec", register_solver(), ids=lambda spec: spec.name)
def test_specs(spec: SolverSpec) -> None:
    assert spec.kinds == ("qp",)
    assert spec.requires[0] == "qpsolvers>=4.4"
    assert spec.install == f"pip install invlayer-qpsolvers {spec.requires[1]}"
    assert not spec.batched
    assert spec.bounds
    assert spec.constraints


def test_every_solver_that_qpsolvers_finds_is_ok() -> None:
    listed = {row.name: row for row in inv.solvers("qp")}
    for name in qpsolvers.available_solvers:
        row = listed[f"qpsolvers.{name}"]
        assert (row.plugin, row.status) == ("invlayer-qpsolvers", "ok")
        assert isinstance(inv.get_solver(row.name), inv.Solver)


def test_a_missing_solver_is_listed_with_its_install_line() -> None:
    missing = [row for row in inv.solvers("qp") if row.plugin == "invlayer-qpsolvers" and row.status != "ok"]
    for row in missing:
        assert row.status == "missing dependency"
        assert "which is not installed" in row.reason
        with pytest.raises(inv.SolverLoadError, match="pip install invlayer-qpsolvers"):
            inv.get_solver(row.name)


def test_listing_imports_neither_qpsolvers_nor_scipy() -> None:
    code = (
        "import json, sys, invlayer_core as inv; inv.solvers('qp'); "
        "print(json.dumps([m for m in ('qpsolvers', 'scipy', 'clarabel') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
