"""The power-flow example against a 40-digit reference solution of the IEEE 14-bus case."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "power_flow"))  # the example is a script, not a package

import case14  # noqa: E402
import demo  # noqa: E402
import physics  # noqa: E402

CASE = json.loads((ROOT / "tests" / "data" / "ieee14_power_flow.json").read_text(encoding="utf-8"))


def to_tensor(numbers: Sequence[str]) -> Tensor:
    return torch.tensor([float(Fraction(number)) for number in numbers], dtype=torch.float64)


@pytest.fixture
def root() -> Tensor:
    return to_tensor(CASE["root"])


@pytest.fixture
def params() -> Tensor:
    """Set-points (5), real (13) and reactive (9) injections in one vector, as the reference orders them."""
    return to_tensor(CASE["param_values"])


def split(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return params[:5], params[5:18], params[18:]


NUMBER = r"\((-?\d+(?:\.\d+)?)\)"


def reference_branches() -> dict[tuple[int, int], complex]:
    """G_ik + jB_ik as the reference's real-power equations of buses 2..14 name them.

    They read P_i = Σ_k v_i v_k (G_ik cos(a_i - a_k) + B_ik sin(a_i - a_k)), with v_i² G_ii for k = i.
    """
    term = rf"vs?(\d+)\*\({NUMBER}\*cos\([^+]*\+{NUMBER}\*sin"
    return {
        (bus, int(other)): complex(float(g), float(b))
        for bus, equation in enumerate(CASE["residual"][:13], start=2)
        for other, g, b in re.findall(term, equation)
    }


def test_tables_give_the_reference_parameters(params: Tensor) -> None:
    p, q = case14.injections()
    assert torch.cat([case14.SET_POINTS, p, q]).allclose(params, rtol=0, atol=1e-15)


def test_branch_admittances_equal_reference_coefficients() -> None:
    g, b = case14.admittance()
    branches = reference_branches()
    linked = torch.nonzero(torch.complex(g, b).triu(1) != 0) + 1
    assert {tuple(sorted(pair)) for pair in branches} == {tuple(pair) for pair in linked.tolist()}
    for (i, k), y in branches.items():
        assert complex(g[i - 1, k - 1], b[i - 1, k - 1]) == pytest.approx(y, rel=1e-13)
    assert torch.equal(g, g.T)
    assert torch.equal(b, b.T)


def test_diagonal_admittances_equal_reference_coefficients() -> None:
    """The real equations hold + v_i² G_ii; the reactive ones, whose sum Q_i takes off B_ii, v_i² (-B_ii)."""
    g, b = case14.admittance()
    conductances = [re.search(rf"v[s\d]+\*{NUMBER}", text) for text in CASE["residual"][:13]]
    susceptances = [re.search(rf"v\d+\*\(-{NUMBER}\)", text) for text in CASE["residual"][13:]]
    assert g.diag()[1:].allclose(to_tensor([m[1] for m in conductances if m]), rtol=1e-13)
    assert b.diag()[case14.PQ_BUSES].allclose(to_tensor([m[1] for m in susceptances if m]), rtol=1e-13)


def test_mismatch_vanishes_at_the_reference_root(root: Tensor, params: Tensor) -> None:
    assert physics.mismatch(root, *split(params)).abs().max() < 1e-10


def test_losses_equal_the_sum_over_branches(root: Tensor) -> None:
    """Counted branch by branch: -G_ik |V_i - V_k|² in the branch, the row sum of G to ground."""
    g, _ = case14.admittance()
    magnitude, angle = physics.voltages(root, case14.SET_POINTS)
    v = torch.polar(magnitude, angle)
    pairs = -(g - g.diag().diag()) * (v[:, None] - v).abs() ** 2 / 2
    to_ground = g.sum(1) * magnitude**2
    expected = pairs.sum() + to_ground.sum()
    assert physics.losses(root, case14.SET_POINTS).item() == pytest.approx(expected.item(), rel=1e-12)


def test_shared_arguments_broadcast_over_a_batch(root: Tensor, params: Tensor) -> None:
    set_points, p, q = split(params)
    y = root + torch.linspace(0, 0.1, 6, dtype=root.dtype).reshape(2, 3, 1)
    whole = physics.mismatch(y, set_points, p.expand(2, 3, -1), q)
    single = torch.stack([physics.mismatch(one, set_points, p, q) for one in y.reshape(6, -1)])
    assert whole.reshape(6, -1).allclose(single, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "solver",
    [pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy")), "torch.newton"],
)
def test_implicit_gradient_equals_reference(solver: str, root: Tensor, params: Tensor) -> None:
    def solve(params: Tensor) -> Tensor:
        y: Tensor = inv.root(physics.mismatch, physics.flat_start(), args=split(params), solver=solver)
        return y

    assert solve(params).allclose(root, rtol=0, atol=1e-8)
    expected = torch.stack([to_tensor(row) for row in CASE["dy_dparams"]])
    gradient = torch.autograd.functional.jacobian(solve, params)
    assert gradient.allclose(expected, rtol=0, atol=1e-8)


@pytest.mark.plugin("invlayer-scipy")
def test_demo_runs_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "power_flow.png"
    demo.main(["--steps", "2", "--scenarios", "4", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "12 of 12 flows solved" in capsys.readouterr().out
