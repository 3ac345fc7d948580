"""What does not fit is refused by a message that names it, says what is accepted and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

ZEROS = torch.zeros(2, 3, dtype=torch.float64)


def same(y: Any, *args: Any) -> Any:
    return y


GUESSES: dict[str, tuple[Any, Any, str]] = {
    "empty dict": ({}, 1, r"y0 is \{\}, which holds no tensor"),
    "empty tuple": ((), 1, r"y0 is \(\), which holds no tensor"),
    "number among the leaves": (
        {"pose": ZEROS, "gain": 1.0}, 1,

               r"y0\['gain'\] is a float; accepted is a floating-point or .*as_tensor\(y0\['gain'\]",
    ),
    "array among the leaves": ([ZEROS, np.zeros(2)], 1, r"y0\[1\] is a ndarray"),
    "None among the leaves": ((ZEROS, None), 1, r"y0\[1\] is a NoneType"),
    "text": ("y", 1, "y0 is a str"),
    "integer leaf": ((ZEROS, ZEROS.long()), 1, r"y0\[1\] has dtype torch.int64; .*y0\[1\]\.double\(\)"),
    "boolean leaf": ({"m": torch.tensor([True])}, 1, r"y0\['m'\] has dtype torch.bool"),
    "nested integer leaf": ({"a": [ZEROS, (ZEROS.int(),)]}, 1, r"y0\['a'\]\[1\]\[0\] has dtype torch.int32"),
    "other batch dims": (
        (ZEROS, torch.zeros(4, 3)), 1,

               r"y0\[0\] has batch dims \(2,\) .*event_dims=1\), but y0\[1\] has \(4,\)(?s:.*)expand",
    ),
    "batch dims by event_dims": ((ZEROS, torch.zeros(2)), 1,
        r"y0\[0\] has batch dims \(2,\) .*but y0\[1\] has \(\)"),
    "shared leaf": ((ZEROS, torch.zeros(3)), 1,
        r"y0\[0\] has .*but y0\[1\] has \(\)(?s:.*)same batch dims for every leaf"),
    "too few dims": (
        {"pose": ZEROS, "gain": torch.zeros(())}, 1,

               r"y0\['gain'\] has shape \(\), with fewer dims than event_dims=1(?s:.*)event_dims= in the",
    ),
    "mixed devices": (
        (ZEROS, torch.zeros(2, 3, device="meta")), 1,
        r"y0\[0\] is on cpu but y0\[1\] is on meta; accepted is one device. Use \.to\('cpu'\)",
    ),
    "event_dims for another structure": (
        {"pose": ZEROS, "gain": ZEROS}, (1, 1),
        r"event_dims=\(1, 1\) does not fit y0; (?s:.*)such as event_dims=\{'pose': 1, 'gain': 1\}",
    ),
    "event_dims with other keys": ({"pose": ZEROS}, {"position": 1},
        r"event_dims=\{'position': 1\} does not fit y0"),
    "event_dims with fewer leaves": ((ZEROS, ZEROS), (1,), r"event_dims=\(1,\) does not fit y0"),
    "event_dims too deep": ((ZEROS, ZEROS), (1, (1, 1)), r"event_dims=\(1, \(1, 1\)\) does not fit y0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [inv.root, inv.fixed_point])
@pytest.mark.parametrize(("y0", "event_dims", "message"), GUESSES.values(), ids=GUESSES)
def test_guess(kind: Any, y0: Any, event_dims: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=f"{kind.__name__}: {message}"):
        kind(same, y0, event_dims=event_dims)


@pytest.mark.parametrize(
    "event_dims", [(1, -1), {"a": 1.0}, [None], (), {}, "1", ("1",), -1, 1.0, None], ids=str
)
def test_event_dims(event_dims: Any) -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"event_dims=.*: accepted is an integer >= 0, or integers >= 0 in"
    ):
        inv.root(same, (ZEROS, ZEROS), event_dims=event_dims)


def test_structure_of_event_dims_for_one_tensor() -> None:
    message = r"event_dims=\{'y': 1\} came with one tensor y of shape \(2, 3\); accepted is an integer"
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(same, ZEROS, event_dims={"y": 1})
    with pytest.raises(inv.ConditionsError, match=message):
        inv.implicit_function(same, event_dims={"y": 1})(lambda a: a)(ZEROS)


def test_structure_of_event_dims_for_one_complex_tensor() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"event_dims=\(1,\) does not fit y0; .*such as event_dims=1\."
    ):
        inv.root(same, ZEROS + 0j, event_dims=(1,))


RESIDUALS: dict[str, tuple[Any, str]] = {
    "one equation too few": (
        lambda y: (y["pose"], y["gain"][..., :2]),
        r"returned 5 equations per system for 6 unknowns .y\['pose'\] \(3,\) torch.float64, .*as many eq",
    ),
    "one equation too many": (
        lambda y: [y["pose"], y["gain"], y["gain"][..., 0]],
        "returned 7 equations per system",
    ),
    "another batch": (
        lambda y: {"a": y["pose"], "b": y["gain"][:1]},
        r"returned shape \(1, 3\) at \['b'\]; accepted is \(2,\), the batch dims of y",
    ),
    "no batch": (lambda y: (y["pose"], y["gain"].sum()), r"returned shape \(\) at \[1\]; accepted is \(2,\)"),
    "number": (lambda y: (y["pose"], 0.0), r"returned float at \[1\]; accepted are tensors"),
    "array": (lambda y: y["pose"].detach().numpy(), "returned ndarray; accepted are tensors"),
    "None": (lambda y: None, "returned NoneType; accepted are tensors"),
    "nothing": (lambda y: {}, r"returned \{\}; accepted are tensors"),
    "integers": (lambda y: (y["pose"].long(), y["gain"]), r"returned dtype torch.int64 at \[0\]"),
    "booleans": (
        lambda y: y["pose"] > 0,
        "returned dtype torch.bool; accepted are floating-point and complex",
    ),
}


@pytest.mark.parametrize(("f", "message"), RESIDUALS.values(), ids=RESIDUALS)
@pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy"))]
)
def test_residual(f: Any, message: str, solver: str) -> None:
    with pytest.raises(inv.ConditionsError, match=f"conditions '.*<lambda>' {message}"):
        inv.root(f, {"pose": ZEROS, "gain": ZEROS}, solver=solver)


FIXED_POINTS: dict[str, tuple[Any, str]] = {
    "other keys": (
        lambda y: {"pose": y["pose"]},
        r"T returned \{'pose': \*\}; accepted is the structure of y, \{'pose': \*, 'gain': \*\}"
    ),
    "tuple": (lambda y: (y["pose"], y["gain"]), r"T returned \(\*, \*\); accepted is the structure of y"),
    "tensor": (lambda y: y["pose"], r"T returned one tensor; accepted is the structure of y"),
    "number": (lambda y: {"pose": y["pose"], "gain": 1.0}, "T returned .*accepted"),
}  # fmt: skip


@pytest.mark.parametrize(("T", "message"), FIXED_POINTS.values(), ids=FIXED_POINTS)
def test_map_of_another_structure(T: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        inv.fixed_point(T, {"pose": ZEROS, "gain": ZEROS})


def test_map_of_one_tensor_to_another_structure() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"T returned \(\*, \*\); accepted is the structure of y, one tensor"
    ):
        inv.fixed_point(lambda y: (y, y), ZEROS)
    with pytest.raises(
        inv.ConditionsError, match=r"T returned ndarray; accepted is the structure of y, one tensor"
    ):
        inv.fixed_point(lambda y: y.detach().numpy(), ZEROS)


SOLUTIONS: dict[str, tuple[Any, str]] = {
    "tensor": (lambda y: y["pose"],
        r"solver returned one tensor; accepted is the structure of y, \{'pose': \*"),
    "tuple": (lambda y: (y["pose"], y["gain"]),
        r"solver returned \(\*, \*\); accepted is the structure of y"),
    "shape": (
        lambda y: {"pose": y["pose"], "gain": y["gain"][:, :2]},
        r"solver: y\['gain'\] has shape \(2, 2\); accepted is \(2, 3\)",
    ),
    "batch": (lambda y: {k: v[:1] for k, v in y.items()},
        r"solver returned y of shape \(1, 6\); accepted .* \(2, 6\)"),
    "integers": (lambda y: {k: v.long() for k, v in y.items()}, r"solver: y\['pose'\] has dtype torch.int64"),
    "arrays": (lambda y: {k: v.numpy() for k, v in y.items()}, r"solver: y\['pose'\] is a ndarray"),
    "complex": (lambda y: {k: v + 1j for k, v in y.items()},
        r"solver: y\['pose'\] has dtype torch.complex128; accepted is a real"),
    "None": (lambda y: None, "solver returned NoneType; accepted is the structure of y"),
}  # fmt: skip


@pytest.mark.parametrize(("result", "message"), SOLUTIONS.values(), ids=SOLUTIONS)
def test_result_of_a_plain_callable(result: Any, message: str) -> None:
    def solver(y0: Any) -> Any:
        return result(y0)

    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(same, {"pose": ZEROS, "gain": ZEROS}, solver=solver)


def test_complex_result_for_a_real_guess() -> None:
    with pytest.raises(inv.ConditionsError, match=r"returned dtype torch.complex128; accepted is one real"):
        inv.root(same, ZEROS, solver=lambda y0: y0 + 1j)


RETURNED: dict[str, tuple[Any, str]] = {
    "array": (lambda a: a.numpy(), r"y is a ndarray; (?s:.*)inv\.from_numpy"),
    "None": (lambda a: None, "y is a NoneType"),
    "integers": (lambda a: a.long(), "y has dtype torch.int64"),
    "number in a dict": (lambda a: {"y": a, "n": 3}, r"y\['n'\] is a int"),
    "tensor and number in a list": (lambda a: [a, 3], r"y\[1\] is a int"),
    "batch dims": (lambda a: {"y": a, "z": a[0]}, r"y\['y'\] has batch dims \(2,\)"),
    "empty": (lambda a: {}, r"y is \{\}, which holds no tensor"),
}


@pytest.mark.parametrize(("solve", "message"), RETURNED.values(), ids=RETURNED)
@pytest.mark.parametrize("kind", ["implicit_function", "inverse"])
def test_result_of_ones_own_solver(solve: Any, message: str, kind: str) -> None:
    def own(a: Tensor) -> Any:
        return solve(a)

    calls = {
        "inverse": lambda: inv.inverse(ZEROS, own, f=same),
        "implicit_function": lambda: inv.implicit_function(same)(own)(ZEROS),
    }
    with pytest.raises(inv.ConditionsError, match=f"own: {message}"):
        calls[kind]()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({}, r"x is \{\}, which holds no tensor"),
        ({"x": 1.0}, r"x\['x'\] is a float"),
        ((ZEROS, ZEROS.long()), r"x\[1\] has dtype torch.int64"),
    ],
    ids=["empty", "number", "integers"],
)
def test_argument_of_an_inverse(x: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=f"inverse: {message}"):
        inv.inverse(x, same, f=same)


def test_inverse_with_f_of_another_structure() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"f returned one tensor; accepted is the structure of x, \(\*, \*\)"
    ):
        inv.inverse((ZEROS, ZEROS), same, f=lambda y: y[0])


def test_inverse_of_a_pytree_by_its_jacobian() -> None:
    eye = torch.eye(3).expand(2, 3, 3)
    for x, g in [
        ((ZEROS,), same),
        (ZEROS, lambda x: [x]),
        ((ZEROS,), lambda x: x[0]),
        (ZEROS + 0j, lambda x: x.real),
    ]:
        with pytest.raises(inv.ConditionsError, match=r"jacobian=(?s:.*)pytree or complex. Accepted .*f="):
            inv.inverse(x, g, jacobian=eye)


def test_options_for_a_plain_callable() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"options=\{'maxiter': 3\} came with solver=.*plain callable"
    ):
        inv.root(same, (ZEROS,), solver=same, options={"maxiter": 3})


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="unknown keyword tolerance"):
        inv.root(same, (ZEROS,), tolerance=1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["pose", "gain", "args"])
def test_bad_numbers(bad: float, where: str) -> None:
    """Of one sample: it is named, and the others are not touched."""
    y0, a = {"pose": torch.zeros(3, 2), "gain": torch.zeros(3)}, torch.ones(3, 2)
    (a if where == "args" else y0[where])[1].fill_(bad)
    f = lambda y, a: (y["pose"] ** 3 + y["pose"] - a, y["gain"] + y["pose"].sum(-1))  # noqa: E731
    with pytest.raises(inv.ConvergenceError, match=r"1 of 3 samples(?s:.*)sample 1: NOT_FINITE"):
        inv.root(f, y0, a, event_dims={"pose": 1, "gain": 0})
    y = inv.root(f, y0, a, event_dims={"pose": 1, "gain": 0}, on_failure="nan")
    assert y["gain"].isfinite().tolist() == [True, False, True]
    assert y["pose"].isfinite().tolist() == [[True] * 2, [False] * 2, [True] * 2]


def test_args_on_another_device() -> None:
    with pytest.raises(inv.ConditionsError, match=r"y0 is on cpu but tensor 0 of args .* is on meta"):
        inv.root(lambda y, a: y, (ZEROS,), torch.ones(2, 3, device="meta"))


def test_samples_that_mix() -> None:
    y0 = {"pose": torch.zeros(3, 2), "gain": torch.zeros(3)}
    a = torch.ones(3, requires_grad=True)
    f = lambda y, a: (y["pose"] - 1, y["gain"] + y["gain"].mean() / 2 - a)  # noqa: E731
    y = inv.root(
        f, y0, a, event_dims={"pose": 1, "gain": 0},
        solver=lambda y0, a: {"pose": torch.ones(3, 2), "gain": a - a.mean() / 3},
    )  # fmt: skip
    with pytest.raises(inv.ConditionsError, match=r"mix the samples of the batch \(3,\)"):
        y["gain"].sum().backward()
