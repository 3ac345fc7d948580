"""A solver on the other side of the border never gets the args: f runs where they live.

Here the args are tensors that refuse to leave; ``test_fake_device.py`` counts what does cross, and how often.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.devices.scenarios import Crossing, Picard, derivatives
from torch import Tensor

import invlayer_core as inv

_WAYS_OUT = ("numpy", "cpu", "tolist", "item", "to", "__array__", "__dlpack__", "__float__", "__bool__")


class Homebody(Tensor):
    """A tensor that stays where it is; so do its detached and reshaped aliases, but not what is computed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _WAYS_OUT and isinstance(args[0], cls):
            raise AssertionError(f"arg of shape {tuple(args[0].shape)} left its device by .{name}()")
        result = super().__torch_function__(func, types, args, kwargs or {})
        aliases = name in ("detach", "view_as", "requires_grad_", "alias", "clone")
        if isinstance(result, cls) and not aliases:
            return result.as_subclass(Tensor)
        return result


def staying(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Homebody).requires_grad_()


SOLVERS = pytest.mark.parametrize(
    "solver",
    [
        pytest.param(Picard(), id="own"),
        pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy")),
        pytest.param("scipy.root", marks=pytest.mark.plugin("invlayer-scipy")),
    ],
)


@SOLVERS
@pytest.mark.parametrize("how", ["serial", "lockstep"])
def test_args_stay(solver: Any, how: str) -> None:
    """Solve, backward and double backward, with the numbers of args that may travel."""
    y0, a, b = Crossing.on("cpu")
    kept = staying(a), staying(b)
    ours = derivatives(inv.root(Crossing.conditions, y0, kept, solver=solver, batch=how), *kept)
    theirs = derivatives(inv.root(Crossing.conditions, y0, (a, b), solver=solver, batch=how), a, b)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach().as_subclass(Tensor), other, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["serial", "lockstep"])
def test_a_solver_that_asks_for_the_args_is_seen(how: str) -> None:
    """The control: f itself takes an arg to NumPy, as a careless adapter would."""
    y0, a, b = Crossing.on("cpu")

    def careless(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a.detach().numpy()
        return Crossing.conditions(y, a, b)

    with pytest.raises(AssertionError, match=r"shape \(5,\) left its device by .numpy\(\)"):
        inv.root(careless, y0, (staying(a), staying(b)), solver=Picard(), batch=how, on_failure="zero_grad")


def test_a_function_of_numpy_takes_its_args_by_consent() -> None:
    """``inv.from_numpy`` is the user's own word that args may be copied to the host."""
    _, _, b = Crossing.on("cpu")
    solve = inv.implicit_function(lambda y, b: y - b)(inv.from_numpy(lambda b: b))
    with pytest.raises(AssertionError, match=r"shape \(3, 7\) left its device by .to\(\)"):
        solve(staying(b))
