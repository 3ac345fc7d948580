"""Every benchmark script still runs; what it measures is read by people, not asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED = ("harness.py", "maros_meszaros.py")
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in SHARED)
NEEDS = {
    **dict.fromkeys(
        ("lockstep.py", "batch_modes.py", "implied_volatility.py", "sparse_poisson.py"), "invlayer-scipy"
    ),
    "casadi_layers.py": "invlayer-casadi",
    "convex_layers.py": "invlayer-cvxpy",
    "quadratic_programs.py": "invlayer-qpsolvers",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(name, marks=pytest.mark.plugin(NEEDS[name])) if name in NEEDS else name
        for name in SCRIPTS
    ],
)
def test_runs(script: str) -> None:
    command = [sys.executable, "-W", "error", script, "--quick"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "x     1.00" in done.stdout


def test_every_script_is_described() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}`" not in text] == []
