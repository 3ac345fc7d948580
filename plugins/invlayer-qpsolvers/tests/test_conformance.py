"""Every installed solver keeps the rules of the conformance kit for quadratic programs."""

import pytest
import qpsolvers

from invlayer_core.testing import check_solver

INSTALLED = [
    name
    for name in ("clarabel", "daqp", "ecos", "highs", "osqp", "piqp", "proxqp", "quadprog", "scs")
    if name in qpsolvers.available_solvers
]


ALWAYS = ("clarabel", "daqp")  # the others in the slow suite: their adapter is the same


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in INSTALLED]
)
def test_rules(name: str) -> None:
    report = check_solver(f"qpsolvers.{name}", tolerance=1e-4)
    assert not report.broken
    assert len(report.results) == 10
