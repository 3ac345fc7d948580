"""The cart-and-pole example: gradients of a plan with active bounds, and the demo itself."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "cart_pole_mpc"  # the example is a script, not a package


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The modules cart_pole and demo, under names that no other example's modules have."""
    loaded = []
    for name in ("cart_pole", "demo"):
        spec = spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        if name == "demo":
            monkeypatch.setitem(sys.modules, "cart_pole", loaded[0])
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded[0], loaded[1]


@pytest.mark.plugin("invlayer-casadi")
def test_gradients_of_a_plan(example: tuple[ModuleType, ModuleType]) -> None:
    cart_pole, demo = example
    controller = cart_pole.make_controller()
    states = demo.draw_states(3)
    model = demo.EXPERT.log().requires_grad_()
    planned = cart_pole.forces(cart_pole.plan(controller, states, model))
    assert (planned.abs() > cart_pole.FORCE_LIMIT - 1e-12).any()
    assert torch.autograd.gradcheck(
        lambda m: cart_pole.forces(cart_pole.plan(controller, states, m)).sum(-1), model, eps=1e-5, atol=1e-5
    )


@pytest.mark.plugin("invlayer-casadi")
def test_demo_runs_and_draws(
    example: tuple[ModuleType, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "cart_pole_mpc.png"
    example[1].main(["--steps", "2", "--demonstrations", "3", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "length [m] 0.800" in capsys.readouterr().out
