"""Unknowns in tuples, lists, dicts and named tuples: values and derivatives are those of the flat problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.structure.problems import (
    ARRANGEMENTS,
    State,
    args,
    opaque_flat,
    split_residual,
    unrolled_flat,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def layer(
    arrangement: str = "dict", solver: Any = "torch.newton", kind: str = "root", **keywords: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """``(a, b) -> (*batch, 4)``, through a pytree of unknowns."""
    arrange, event_dims, leaves_of = ARRANGEMENTS[arrangement]

    def conditions(y: Any, a: Tensor, b: Tensor) -> Any:
        assert type(y) is type(arrange(torch.zeros(0), torch.zeros(0)))
        return arrange(*split_residual(*leaves_of(y), a, b))

    def step(y: Any, a: Tensor, b: Tensor) -> Any:
        p, g = leaves_of(y)
        of_pose, of_gain = split_residual(p, g, a, b)
        return arrange(p - of_pose / 4, g - of_gain / 4)

    def opaque(a: Tensor, b: Tensor) -> Any:
        y = opaque_flat(a.numpy(), b.numpy())
        return arrange(torch.from_numpy(y[..., :3]), torch.from_numpy(y[..., 3]))

    def call(a: Tensor, b: Tensor) -> Tensor:
        batch = b.shape[:-1]
        y0 = arrange(torch.zeros(*batch, 3), torch.zeros(batch))
        if kind == "implicit_function":
            y = inv.implicit_function(conditions, event_dims=event_dims, **keywords)(opaque)(a, b)
        elif kind == "fixed_point":
            y = inv.fixed_point(step, y0, (a, b), solver=solver, event_dims=event_dims, **keywords)
        else:
            chosen = (lambda _y0, a, b: opaque(a, b)) if solver == "opaque" else solver
            y = inv.root(conditions, y0, (a, b), solver=chosen, event_dims=event_dims, **keywords)
        assert type(y) is type(y0)
        pose, gain = leaves_of(y)
        assert (pose.shape, gain.shape) == ((*batch, 3), batch)
        return torch.cat([pose, gain.unsqueeze(-1)], -1)

    return call


SOLVERS = [
    pytest.param({"solver": "torch.newton"}, id="native"),
    pytest.param({"solver": "opaque"}, id="opaque"),
    pytest.param({"kind": "fixed_point"}, id="fixed_point"),
    pytest.param({"kind": "implicit_function"}, id="implicit_function"),
    pytest.param(
        {"solver": "scipy.fsolve", "options": {"xtol": 1e-13}},
        id="fsolve",
        marks=pytest.mark.plugin("invlayer-scipy"),
    ),
]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("how", SOLVERS)
def test_values_and_gradients(arrangement: str, how: dict[str, Any]) -> None:
    a, b = (t.requires_grad_() for t in args(2))
    y, expected = layer(arrangement, **how)(a, b), unrolled_flat(a, b)
    torch.testing.assert_close(y, expected, **TIGHT)
    weight = torch.arange(1.0, 9.0).reshape(2, 4)
    for ours, theirs in zip(
        torch.autograd.grad((weight * y).sum(), (a, b)),
        torch.autograd.grad((weight * expected).sum(), (a, b)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("how", SOLVERS)
def test_finite_differences_of_first_and_second_derivatives(how: dict[str, Any]) -> None:
    inputs = tuple(t.requires_grad_() for t in args(2))
    assert gradcheck(layer(**how), inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer(**how), inputs)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f: torch.func.grad(lambda b: f(b).pow(2).sum()),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "vmap": torch.vmap,
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda b: f(b).pow(2).sum())),
    "vmap of vmap": lambda f: lambda b: torch.vmap(torch.vmap(f))(torch.stack([b, b + 0.1])),
    "grad of vmap": lambda f: torch.func.grad(lambda b: torch.vmap(f)(b).pow(2).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("how", [SOLVERS[0], SOLVERS[1], SOLVERS[3], SOLVERS[4]])
def test_transforms(name: str, how: dict[str, Any]) -> None:
    a, b = args(2)
    transform = TRANSFORMS[name]
    ours = transform(lambda b: layer("named tuple", **how)(a, b))(b)
    theirs = transform(lambda b: unrolled_flat(a, b))(b)
    torch.testing.assert_close(ours, theirs, **TIGHT)


def test_structure_survives_the_transforms() -> None:
    """Not only a tensor made of the leaves: the pytree itself comes out of vmap and jacrev."""
    a, b = args(3)

    def solve(b: Tensor) -> State:
        y0 = State(torch.zeros(3), torch.zeros(()))
        return inv.root(lambda y, a, b: split_residual(*y, a, b), y0, (a, b), event_dims=State(1, 0))

    y, expected = torch.vmap(solve)(b), unrolled_flat(a, b)
    assert isinstance(y, State)
    torch.testing.assert_close(y.pose, expected[:, :3], **TIGHT)
    jacobian = torch.func.jacrev(solve)(b[0])
    assert isinstance(jacobian, State)
    of_unrolled = torch.func.jacrev(lambda b: unrolled_flat(a, b))(b[0])
    torch.testing.assert_close(jacobian.pose, of_unrolled[:3], **TIGHT)
    torch.testing.assert_close(jacobian.gain, of_unrolled[3], **TIGHT)


def test_captured_parameters() -> None:
    """A module of pytrees: its parameters are found through the packed conditions, too."""

    class Conditions(nn.Module):
        def __init__(self, a: Tensor) -> None:
            super().__init__()
            self.a = nn.Parameter(a.clone())

        def forward(self, y: dict[str, Tensor], b: Tensor) -> tuple[Tensor, Tensor]:
            return split_residual(y["pose"], y["gain"], self.a, b)

    a, b = args(2)
    module = Conditions(a)
    y0 = {"pose": torch.zeros(2, 3), "gain": torch.zeros(2)}
    root = inv.RootLayer(module, event_dims={"pose": 1, "gain": 0})
    y = root(b, y0=y0)
    (y["pose"].sum() + y["gain"].pow(2).sum()).backward()
    a.requires_grad_()
    expected = unrolled_flat(a, b)
    (expected[:, :3].sum() + expected[:, 3].pow(2).sum()).backward()
    torch.testing.assert_close(module.a.grad, a.grad, **TIGHT)
    fixed = inv.FixedPointLayer(lambda y, b: subtract(y, module(y, b)), event_dims={"pose": 1, "gain": 0})
    torch.testing.assert_close(fixed(b, y0=y0), y, **TIGHT)


def subtract(y: dict[str, Tensor], step: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {
        "gain": y["gain"] - step[1] / 4,
        "pose": y["pose"] - step[0] / 4,
    }  # keys in another order than y's


@pytest.mark.parametrize("polish", [0, 2])
@pytest.mark.parametrize("how", [SOLVERS[0], SOLVERS[3]])
def test_failed_samples_and_info(polish: int, how: dict[str, Any]) -> None:
    """One sample has NaN in its args: it alone is NaN, its status says so, and shared gradients are clean."""
    a, b = args(3)
    b[1, 0] = torch.nan
    a.requires_grad_()
    keywords = {
        "on_failure": "nan",
        "polish": polish,
        "event_dims": {"pose": 1, "gain": 0},
        "return_info": True,
    }
    conditions = lambda y, a, b: split_residual(y["pose"], y["gain"], a, b)  # noqa: E731
    y0 = {"pose": torch.zeros(3, 3), "gain": torch.zeros(3)}
    if how.get("kind") == "implicit_function":

        @inv.implicit_function(conditions, **keywords)
        def solve(a: Tensor, b: Tensor) -> dict[str, Tensor]:
            y = torch.from_numpy(opaque_flat(a.numpy(), b.nan_to_num(1.0).numpy()))
            return {"pose": y[:, :3], "gain": y[:, 3]}

        y, info = solve(a, b)
    else:
        y, info = inv.root(conditions, y0, (a, b), **keywords)
    assert info.ok.tolist() == [True, False, True]
    assert info.residual.shape == (3,)
    assert y["gain"].isnan().tolist() == [False, True, False]
    assert bool(y["pose"][1].isnan().all())
    good = y["pose"][[0, 2]].sum() + y["gain"][[0, 2]].sum()
    (gradient,) = torch.autograd.grad(good, a)
    (expected,) = torch.autograd.grad(unrolled_flat(a, b[[0, 2]]).sum(), a)
    torch.testing.assert_close(gradient, expected, **TIGHT)


def test_singular_policy_and_matrix_free_adjoint() -> None:
    a, b = args(2)
    b.requires_grad_()
    for adjoint in (
        inv.adjoints.Implicit(linear_solver=inv.linear.GMRES()),
        inv.adjoints.Implicit(singular="lstsq"),
    ):
        y = layer(adjoint=adjoint)(a, b)
        (first,) = torch.autograd.grad(y.pow(2).sum(), b, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), b)
        (expected,) = torch.autograd.grad(unrolled_flat(a, b).pow(2).sum(), b, create_graph=True)
        (of_second,) = torch.autograd.grad(expected.sin().sum(), b)
        torch.testing.assert_close(first, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(second, of_second, rtol=1e-7, atol=1e-8)


def test_own_jacobian_in_the_order_of_the_leaves() -> None:
    calls = []

    def jacobian(y: tuple[Tensor, Tensor], a: Tensor) -> Tensor:
        calls.append(1)
        return torch.diag_embed(torch.cat([3 * y[0] ** 2, 2 * y[1]], -1))

    a = torch.tensor([[2.0, 3.0, 4.0]], requires_grad=True)
    conditions = lambda y, a: (y[0] ** 3 - a[:, :2], y[1] ** 2 - a[:, 2:])  # noqa: E731
    solve = lambda a: inv.root(conditions, (torch.ones(1, 2), torch.ones(1, 1)), a, jacobian=jacobian)  # noqa: E731
    assert gradcheck(solve, a, check_forward_ad=True)
    assert gradgradcheck(solve, a)
    assert calls


def test_inverse_of_a_function_between_pytrees() -> None:
    """x = (radius, angle) from y = {"point": ...}: g returns a dict, f returns what g was given."""

    def f(y: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        u, v = y["point"].unbind(-1)
        return torch.hypot(u, v), torch.atan2(v, u)

    @inv.from_numpy
    def g(x: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        return {"point": np.stack([x[0] * np.cos(x[1]), x[0] * np.sin(x[1])], -1)}

    radius, angle = torch.tensor([1.5, 2.0], requires_grad=True), torch.tensor([0.3, 1.2], requires_grad=True)
    solve = lambda r, t: inv.inverse((r, t), g, f=f)["point"]  # noqa: E731
    exact = lambda r, t: torch.stack([r * t.cos(), r * t.sin()], -1)  # noqa: E731
    torch.testing.assert_close(solve(radius, angle), exact(radius, angle))
    assert gradcheck(solve, (radius, angle), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solve, (radius, angle))
    torch.testing.assert_close(
        torch.func.hessian(solve)(radius.detach(), angle.detach()),
        torch.func.hessian(exact)(radius.detach(), angle.detach()),
    )
    layer = inv.InverseLayer(g, f=f)
    assert torch.equal(layer((radius, angle))["point"], solve(radius, angle))


# --- implicit_function: what is y and what is aux -------------------------------------------------------


def squares(y: Any, a: Tensor) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf**2 - a, y)


A = torch.tensor([[4.0, 9.0]], dtype=torch.float64)
ROOT = A.sqrt()


@pytest.mark.parametrize(
    ("returned", "event_dims", "y_is", "has_aux"),
    [
        ((ROOT, ROOT), 1, "first", True),
        ((ROOT, ROOT), (1, 1), "all", False),
        (((ROOT, ROOT), ROOT), (1, 1), "first", True),
        (((ROOT, ROOT), {"any": 1}), (1, 1), "first", True),
        (((ROOT, ROOT), "any"), 1, "first", True),
        (([ROOT, ROOT], None), [1, 1], "first", True),
        ([ROOT, ROOT], 1, "all", False),
        ((ROOT, ROOT, ROOT), 1, "all", False),
        (State(ROOT, ROOT), 1, "all", False),
        ((State(ROOT, ROOT), 1), 1, "first", True),
        ({"y": ROOT, "aux": ROOT}, 1, "all", False),
        (((ROOT, ROOT), ROOT), ((1, 1), 1), "all", False),
    ],
)  # fmt: skip
def test_pair_is_y_and_aux_unless_event_dims_says_otherwise(
    returned: Any, event_dims: Any, y_is: str, has_aux: bool
) -> None:
    a = A.clone().requires_grad_()
    solve = inv.implicit_function(squares, event_dims=event_dims)(lambda a: returned)
    result = solve(a)
    y = result[0] if has_aux else result
    torch.testing.assert_close(y, returned if y_is == "all" else returned[0])
    if has_aux:
        assert result[1] is returned[1]
    leaves = torch.utils._pytree.tree_leaves(y)
    (gradient,) = torch.autograd.grad(sum(leaf.sum() for leaf in leaves), a)
    torch.testing.assert_close(gradient, len(leaves) / (2 * ROOT))


@pytest.mark.parametrize("event_dims", [1, (1, 1)])
def test_pair_from_numpy(event_dims: Any) -> None:
    """Two arrays from a NumPy function: y and aux, or both y."""
    a = A.clone().requires_grad_()
    solve = inv.implicit_function(squares, event_dims=event_dims)(
        inv.from_numpy(lambda a: (np.sqrt(a), np.sqrt(a)))
    )
    first, second = solve(a)
    assert first.requires_grad
    assert isinstance(second, np.ndarray) if event_dims == 1 else second.requires_grad


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_guess_and_result_of_a_numpy_solver(arrangement: str) -> None:
    arrange, event_dims, leaves_of = ARRANGEMENTS[arrangement]
    a, b = args(2)

    @inv.from_numpy
    def solver(y0: Any, a: np.ndarray, b: np.ndarray) -> Any:
        assert all(type(leaf) is np.ndarray for leaf in leaves_of(y0))
        y = opaque_flat(a, b)
        return arrange(y[..., :3], y[..., 3])

    y = inv.root(
        lambda y, a, b: split_residual(*leaves_of(y), a, b),
        arrange(torch.zeros(2, 3), torch.zeros(2)), (a, b), solver=solver, event_dims=event_dims,
    )  # fmt: skip
    torch.testing.assert_close(leaves_of(y)[0], unrolled_flat(a, b)[:, :3], **TIGHT)


def test_structure_of_y_may_not_change_between_slices() -> None:
    def solve(a: Tensor) -> Any:
        return {"y": a.sqrt()} if float(a[0]) > 2 else [a.sqrt()]

    with pytest.raises(inv.ConditionsError, match="another structure, shape or dtype for one slice"):
        torch.vmap(inv.implicit_function(squares)(solve))(torch.tensor([[1.0, 1.0], [4.0, 4.0]]))


def test_aux_beside_a_pytree_under_vmap_is_refused() -> None:
    solve = inv.implicit_function(squares)(lambda a: ({"y": a.sqrt()}, "aux"))
    with pytest.raises(inv.UnsupportedTransformError, match="cannot hand out one aux for each slice"):
        torch.vmap(solve)(torch.tensor([[1.0, 8.0], [2.0, 3.0]]))
