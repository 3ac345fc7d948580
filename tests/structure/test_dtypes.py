"""Dtypes: out as in, half precision computed in float32, no autocast inside, and how accurate float32 is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.structure.problems import args, split_residual, unrolled_flat
from torch import Tensor, nn

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

# A unit in the last place of each dtype, times a small number for the conditions of the problem.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def state(*batch: int, pose: torch.dtype, gain: torch.dtype) -> dict[str, Tensor]:
    return {"pose": torch.zeros(*batch, 3, dtype=pose), "gain": torch.zeros(batch, dtype=gain)}


def conditions(y: dict[str, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return split_residual(y["pose"], y["gain"], a, b)


EVENT_DIMS = {"pose": 1, "gain": 0}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["root", "implicit_function", "inverse"])
def test_pytree_in_every_dtype(dtype: torch.dtype, kind: str) -> None:
    """Value and gradients come back in the dtype that came in, as exact as it can hold."""
    a, b = (t.to(dtype).requires_grad_() for t in args(2))
    seen = []

    def watched(y: dict[str, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        seen.append({y["pose"].dtype, y["gain"].dtype, a.dtype, b.dtype})
        return conditions(y, a, b)

    def solver(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        y = unrolled_flat(a.double(), b.double()).to(a.dtype)
        return {"pose": y[:, :3], "gain": y[:, 3]}

    if kind == "root":
        y = inv.root(watched, state(2, pose=dtype, gain=dtype), (a, b), event_dims=EVENT_DIMS)
    elif kind == "implicit_function":
        y = inv.implicit_function(watched, event_dims=EVENT_DIMS)(solver)(a, b)
    else:
        x = {"pose": a.expand(2, 3), "gain": b[:, 0]}
        g = lambda x: {"gain": x["gain"] / 2, "pose": x["pose"] * 4}  # noqa: E731
        f = lambda y: {"pose": y["pose"] / 4, "gain": 2 * y["gain"]}  # noqa: E731
        y = inv.inverse(x, g, f=f, event_dims=EVENT_DIMS)
    grads = torch.autograd.grad(y["pose"].pow(2).sum() + y["gain"].sum(), (a, b))
    assert {y["pose"].dtype, y["gain"].dtype, *(g.dtype for g in grads)} == {dtype}
    if kind == "inverse":
        return
    inside = torch.promote_types(dtype, torch.float32)
    assert all(dtypes == {inside} for dtypes in seen)
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    exact = unrolled_flat(exact_a, exact_b)
    expected = torch.autograd.grad(exact[:, :3].pow(2).sum() + exact[:, 3].sum(), (exact_a, exact_b))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(y["pose"].double(), exact[:, :3], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=4 * tolerance, atol=4 * tolerance)


def test_leaves_of_several_dtypes_are_solved_in_the_widest() -> None:
    """f sees one precision, the widest; every leaf comes back in its own."""
    a, b = args(2)
    b.requires_grad_()
    seen = set()

    def watched(y: dict[str, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        seen.update(leaf.dtype for leaf in y.values())
        return conditions(y, a, b)

    y = inv.root(watched, state(2, pose=torch.float64, gain=torch.float16), (a, b), event_dims=EVENT_DIMS)
    assert seen == {torch.float64}
    assert (y["pose"].dtype, y["gain"].dtype) == (torch.float64, torch.float16)
    exact = unrolled_flat(a, b)
    torch.testing.assert_close(y["pose"], exact[:, :3], rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(p.sum(), b)[0] for p in (y["pose"], exact[:, :3]))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_complex_and_half_leaves() -> None:
    a = torch.tensor([[2.0, 3.0]], dtype=torch.float16, requires_grad=True)
    y0 = {"z": torch.ones(1, 2, dtype=torch.complex64) * 1j, "h": torch.ones(1, 2, dtype=torch.bfloat16)}
    y = inv.root(lambda y, a: {"z": y["z"] ** 2 + a, "h": y["h"] ** 2 - a}, y0, a)
    assert (y["z"].dtype, y["h"].dtype) == (torch.complex64, torch.bfloat16)
    (gradient,) = torch.autograd.grad(y["z"].imag.sum() + y["h"].float().sum(), a)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.double(), 1 / a.detach().double().sqrt(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("of_args", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_guess", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [inv.root, inv.fixed_point])
def test_guess_and_args_of_different_dtypes(kind: Any, of_guess: torch.dtype, of_args: torch.dtype) -> None:
    """y is as y0 is, gradients are as the args are; the accuracy is that of the coarser of both."""
    a = torch.tensor([[0.5, 2.0]], dtype=of_args, requires_grad=True)
    function = (lambda y, a: y**3 + y - a) if kind is inv.root else lambda y, a: y - (y**3 + y - a) / 4
    y = kind(function, torch.zeros(1, 2, dtype=of_guess), a)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert (y.dtype, gradient.dtype) == (of_guess, of_args)
    exact = torch.tensor([[0.42385379906978, 1.0]])
    tolerance = 4 * max(TOLERANCES[of_guess], TOLERANCES[of_args])
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), 1 / (3 * exact**2 + 1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("log_condition", [1, 3])
def test_accuracy_in_single_precision(log_condition: int) -> None:
    """The backward solve is done in float32, and loses the digits that its condition number says, no more."""
    n, batch = 6, 4
    left, right = (torch.linalg.qr(torch.randn(batch, n, n))[0] for _ in range(2))
    singular_values = torch.logspace(0, -log_condition, n)
    matrix = left @ torch.diag(singular_values) @ right
    bend = 0.1 * 10**-log_condition

    def product(matrix: Tensor, y: Tensor) -> Tensor:
        return (matrix @ y.unsqueeze(-1)).squeeze(-1) + bend * torch.sin(y)

    known = torch.randn(batch, n)
    b = product(matrix, known)
    grads, curvatures = [], []
    for dtype in (torch.float32, torch.float64):
        m, c = (t.to(dtype).requires_grad_() for t in (matrix, b))
        y = inv.root(
            lambda y, m, c: product(m, y) - c, known.to(dtype), (m, c), polish=1,
        )  # fmt: skip
        first = torch.autograd.grad(torch.sin(y).sum(), (m, c), create_graph=True)
        grads.append([g.detach().double() for g in first])
        curvatures.append([g.double() for g in torch.autograd.grad(first[1].sum(), (m, c))])
    for single, double in zip(grads[0] + curvatures[0], grads[1] + curvatures[1], strict=True):
        error = (single - double).norm() / double.norm()
        assert float(error) < 200 * 10**log_condition * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.plugin("invlayer-scipy")
def test_solvers_see_float64(dtype: torch.dtype) -> None:
    seen = []

    class Watching(inv.Solver):
        def solve(self, problem: Any, y0: np.ndarray, options: Any) -> inv.SolverResult:
            seen.append((y0.dtype, problem.residual(y0).dtype, problem.jacobian(y0).dtype))
            return inv.get_solver("scipy.fsolve").solve(problem, y0, options)

    a, b = (t.to(dtype).requires_grad_() for t in args(2))
    y = inv.root(
        conditions, state(2, pose=dtype, gain=dtype), (a, b), event_dims=EVENT_DIMS, solver=Watching()
    )
    assert set(seen) == {(np.dtype("float64"),) * 3}
    assert y["pose"].dtype == torch.autograd.grad(y["gain"].sum(), a)[0].dtype == dtype


def test_numpy_functions_see_double_precision() -> None:
    """Real and complex, in pytrees too; what they return comes back in the precision of what came in."""
    seen = []

    @inv.from_numpy
    def function(tree: dict[str, Any], z: np.ndarray) -> dict[str, Any]:
        seen.append((tree["x"][0].dtype, z.dtype, tree["mask"].dtype))
        return {"real": tree["x"][0] + 1, "complex": z * 2, "number": 3.0, "row": [1.0, 2.0]}

    tree = {"x": [torch.ones(2, dtype=torch.float32)], "mask": torch.tensor([True])}
    result = function(tree, torch.ones(2, dtype=torch.complex64))
    assert seen == [(np.dtype("float64"), np.dtype("complex128"), np.dtype("bool"))]
    assert {name: tensor.dtype for name, tensor in result.items()} == {
        "real": torch.float32, "complex": torch.complex64, "number": torch.float32, "row": torch.float32
    }  # fmt: skip
    assert result["row"].shape == (2,)


# --- autocast -------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Conditions made of what autocast would run in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, y: Tensor, a: Tensor) -> Tensor:
        return y + self.out(torch.tanh(self.hidden(y))) / 4 - a


def root_layer(network: Network) -> Callable[[Tensor], Tensor]:
    return lambda a: inv.root(network, torch.zeros_like(a), a)


def polished_layer(network: Network) -> Callable[[Tensor], Tensor]:
    return lambda a: inv.root(
        network,
        torch.zeros_like(a),
        a,
        polish=2,
        adjoint=inv.adjoints.Implicit(linear_solver=inv.linear.GMRES()),
    )


def fixed_point_layer(network: Network) -> Callable[[Tensor], Tensor]:
    return lambda a: inv.fixed_point(lambda y, a: y - network(y, a), torch.zeros_like(a), a)


def plain_solver_layer(network: Network) -> Callable[[Tensor], Tensor]:
    def solver(a: Tensor) -> Tensor:
        y = torch.zeros_like(a)
        for _ in range(60):
            y = y - network(y, a)
        return y

    return inv.implicit_function(network)(solver)


def pytree_layer(network: Network) -> Callable[[Tensor], Tensor]:
    return lambda a: inv.root(lambda y, a: network(y["y"], a), {"y": torch.zeros_like(a)}, a)["y"]


def numpy_layer(network: Network) -> Callable[[Tensor], Tensor]:
    """Serially, as batch="auto" may choose another way each time, and with it other last bits."""
    return lambda a: inv.root(network, torch.zeros_like(a), a, solver="scipy.fsolve", batch="serial")


LAYERS = [
    root_layer,
    polished_layer,
    fixed_point_layer,
    plain_solver_layer,
    pytree_layer,
    pytest.param(numpy_layer, marks=pytest.mark.plugin("invlayer-scipy")),
]


def everything(
    layer: Callable[[Tensor], Tensor], network: Network, a: Tensor, *, backward: Any
) -> list[Tensor]:
    """Value, gradients of first and second order, and a tangent."""
    y = layer(a)
    with backward:
        first = torch.autograd.grad(y.sum(), (a, *network.parameters()), create_graph=True)
    with torch.autocast("cpu", enabled=False):
        second = torch.autograd.grad(first[0].pow(2).sum(), (a, *network.parameters()), allow_unused=True)
    tangent = torch.func.jvp(layer, (a.detach(),), (torch.ones_like(a),))[1]
    return [y, *first, *(g for g in second if g is not None), tangent]


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("make", LAYERS)
def test_autocast_changes_nothing(make: Any, inside: bool) -> None:
    """To the last bit: solve, certificate and derivatives are those of the conditions as they stand."""
    network, a = Network().float(), torch.randn(4, 3, dtype=torch.float32, requires_grad=True)
    layer = make(network)
    expected = everything(layer, network, a, backward=torch.autocast("cpu", enabled=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = everything(
            layer, network, a, backward=torch.autocast("cpu", enabled=inside, dtype=torch.bfloat16)
        )
        assert torch.is_autocast_enabled("cpu")
    assert [t.dtype for t in ours] == [torch.float32] * len(ours)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


def test_residual_under_autocast_is_a_residual() -> None:
    """In bfloat16 it could not get below 1e-3."""
    network, a = Network().float(), torch.randn(4, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, info = inv.root(network, torch.zeros_like(a), a, return_info=True)
    assert float(info.residual.max()) < 1e-5


def test_features_from_autocast_as_args() -> None:
    """An encoder under autocast hands bfloat16 to the layer, which computes in float32."""
    encoder, network = nn.Linear(3, 3).float(), Network().float()
    x = torch.randn(4, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder(x)
        y = inv.root(network, torch.zeros(4, 3, dtype=torch.float32), features)
        y.sum().backward()
    assert (features.dtype, y.dtype, encoder.weight.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    exact = inv.root(network, torch.zeros(4, 3, dtype=torch.float32), features.detach().float())
    assert torch.equal(y, exact)


def test_autocast_of_the_users_own_inside_f() -> None:
    """What f itself switches on is f's own business, and the same in every evaluation."""
    linear = nn.Linear(3, 3).float()
    seen = []

    def f(y: Tensor, a: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = linear(y)
        seen.append(product.dtype)
        return y + product.float() / 8 - a

    a = torch.randn(2, 3, dtype=torch.float32, requires_grad=True)
    y = inv.root(f, torch.zeros(2, 3, dtype=torch.float32), a, atol=2e-2)
    y.sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert a.grad.dtype == torch.float32


def test_autocast_is_on_again_after_an_error() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(inv.ConvergenceError):
            inv.root(lambda y: y**2 + 1, torch.ones(2))
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
