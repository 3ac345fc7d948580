"""Every kind with every split of dims into batch and event: empty, single, and as many samples as unknowns.

The system couples all unknowns of a sample: y + y³/5 + 0.1 Σy = a · p. Its J = D + 0.1 11ᵀ with
D = diag(1 + 3y²/5) has a closed inverse (Sherman & Morrison 1950), which gives the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
SHAPES = [
    (),
    (1,),
    (3,),
    (1, 1),
    (3, 3),
    (2, 3, 3),
    (2, 1, 2, 3),
    (0,),
    (0, 2),
    (2, 0),
    (0, 0),
    (0, 2, 3),
    (2, 0, 3),
]
SPLITS = [(shape, event_dims) for shape in SHAPES for event_dims in range(len(shape) + 1)]


def total(y: Tensor, event_dims: int) -> Tensor:
    """Σ over the event dims, which are kept."""
    return y if event_dims == 0 else y.sum(tuple(range(-event_dims, 0)), keepdim=True)


def f(y: Tensor, event_dims: int) -> Tensor:
    return y + y**3 / 5 + 0.1 * total(y, event_dims)


def solve(right: Tensor, event_dims: int) -> Tensor:
    """y of f(y) = right by Newton's method with the closed inverse."""
    y = torch.zeros_like(right)
    for _ in range(30):
        y = y - apply_inverse(y, f(y, event_dims) - right, event_dims)
    return y


def apply_inverse(y: Tensor, vector: Tensor, event_dims: int) -> Tensor:
    """J⁻¹ vector = J⁻ᵀ vector."""
    inverse = 1 / (1 + 3 * y**2 / 5)
    scaled = inverse * vector
    return scaled - inverse * 0.1 * total(scaled, event_dims) / (1 + 0.1 * total(inverse, event_dims))


def layers(shape: tuple[int, ...], event_dims: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    conditions = lambda y, a, p: f(y, event_dims) - a * p  # noqa: E731
    start = torch.zeros(shape)
    plain = lambda y0, a, p: solve(y0 + a * p, event_dims)  # noqa: E731
    kwargs: dict[str, Any] = {"event_dims": event_dims}
    implicit = inv.implicit_function(conditions, **kwargs)(lambda a, p: plain(start, a, p))
    return {
        "root": lambda a, p: inv.root(conditions, start, (a, p), **kwargs),
        "root, callable": lambda a, p: inv.root(conditions, start, (a, p), solver=plain, **kwargs),
        "fixed_point": lambda a, p: inv.fixed_point(
            lambda y, a, p: y - conditions(y, a, p), start, (a, p), **kwargs
        ),
        "inverse": lambda a, p: inv.inverse(
            a * p, lambda x: solve(x, event_dims), f=lambda y: f(y, event_dims), **kwargs
        ),
        "implicit_function": implicit,
        "in a dict": lambda a, p: inv.root(
            lambda y, a, p: {"r": conditions(y["y"], a, p)}, {"y": start}, (a, p), **kwargs
        )["y"],
    }  # fmt: skip


KINDS = ["root", "root, callable", "fixed_point", "inverse", "implicit_function", "in a dict"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "event_dims"), SPLITS)
def test_every_split(kind: str, shape: tuple[int, ...], event_dims: int) -> None:
    """Value, backward, jvp and vmap; ``a`` is batched, ``p`` is shared, of one system's shape."""
    split = len(shape) - event_dims
    a, p = torch.randn(shape, requires_grad=True), (1 + torch.rand(shape[split:])).requires_grad_()
    layer = layers(shape, event_dims)[kind]
    y = layer(a, p)
    expected = solve((a * p).detach(), event_dims)
    assert y.shape == shape
    torch.testing.assert_close(y.detach(), expected, **TIGHT)

    cotangent = torch.randn(shape)
    weights = apply_inverse(expected, cotangent, event_dims)
    of_a, of_p = torch.autograd.grad(y, (a, p), cotangent)
    torch.testing.assert_close(of_a, weights * p.detach(), **TIGHT)
    torch.testing.assert_close(
        of_p, (weights * a.detach()).sum(tuple(range(split))) if split else weights * a.detach()
    )

    tangents = torch.randn(shape), torch.randn(shape[split:])
    plain = a.detach(), p.detach()
    _, pushed = torch.func.jvp(layer, plain, tangents)
    moved = tangents[0] * plain[1] + plain[0] * tangents[1]
    torch.testing.assert_close(pushed, apply_inverse(expected, moved, event_dims), **TIGHT)

    many = torch.stack([plain[0], plain[0] / 2])
    mapped = torch.vmap(layer, in_dims=(0, None))(many, plain[1])
    torch.testing.assert_close(mapped, solve(many * plain[1], event_dims), **TIGHT)
    of_many = torch.func.grad(lambda a: torch.vmap(layer, in_dims=(0, None))(a, plain[1]).sum())(many)
    torch.testing.assert_close(
        of_many, apply_inverse(mapped, torch.ones_like(mapped), event_dims) * plain[1], **TIGHT
    )


@pytest.mark.parametrize("kind", ["root", "in a dict"])
@pytest.mark.parametrize(
    ("shape", "event_dims"), [((), 0), ((1,), 1), ((3, 3), 1), ((2, 3, 1), 2), ((0, 2), 1)]
)
def test_second_derivatives(kind: str, shape: tuple[int, ...], event_dims: int) -> None:
    """The closed form, differentiated by torch, is the oracle."""
    a, p = torch.randn(shape, requires_grad=True), torch.ones(shape[len(shape) - event_dims :])
    layer = layers(shape, event_dims)[kind]
    results = []
    for y in (layer(a, p), solve(a, event_dims)):
        (first,) = torch.autograd.grad(y.pow(2).sum(), a, create_graph=True)
        results.append(torch.autograd.grad(first.sin().sum(), a)[0])
    torch.testing.assert_close(*results, **TIGHT)
    if a.numel():
        assert torch.autograd.gradgradcheck(lambda a: layer(a, p), a)


@pytest.mark.parametrize("shared", [False, True], ids=["batched", "shared"])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (3, 3), (0,)], ids=str)
@pytest.mark.parametrize("tree", [False, True], ids=["tensor", "pytree"])
def test_matrix_among_the_args(batch: tuple[int, ...], shared: bool, tree: bool) -> None:
    """A ``(3, 3)`` beside three samples of three unknowns: it is what the conditions make of it."""
    n = 3
    matrix = torch.randn(*(() if shared else batch), n, n, requires_grad=True)
    b = torch.randn(*batch, n, requires_grad=True)

    def conditions(y: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
        return y + 0.1 * (matrix @ torch.tanh(y).unsqueeze(-1)).squeeze(-1) - b

    def split(y: tuple[Tensor, Tensor], matrix: Tensor, b: Tensor) -> Tensor:
        return conditions(torch.cat([y[0].unsqueeze(-1), y[1]], -1), matrix, b)

    if tree:
        first, rest = inv.root(
            split, (torch.zeros(batch), torch.zeros(*batch, 2)), (matrix, b), event_dims=(0, 1)
        )
        y = torch.cat([first.unsqueeze(-1), rest], -1)
    else:
        y = inv.root(conditions, torch.zeros(*batch, n), (matrix, b))
    cotangent = torch.randn(*batch, n)
    of_matrix, of_b = torch.autograd.grad(y, (matrix, b), cotangent)
    slope = torch.tanh(y.detach())
    jacobian = torch.eye(n) + 0.1 * matrix.detach() * (1 - slope**2).unsqueeze(-2)
    weights = torch.linalg.solve(jacobian.mT, cotangent.unsqueeze(-1))
    outer = -0.1 * weights * slope.unsqueeze(-2)
    torch.testing.assert_close(conditions(y, matrix, b), torch.zeros_like(b), rtol=0, atol=1e-10)
    torch.testing.assert_close(of_b, weights.squeeze(-1))
    torch.testing.assert_close(of_matrix, outer.reshape(-1, n, n).sum(0) if shared else outer)


LEAVES = [
    pytest.param((), {"u": (2,), "v": (2, 3), "w": ()}, id="one system"),
    pytest.param((2, 3), {"u": (2,), "v": (2, 3), "w": ()}, id="two batch dims"),
    pytest.param((0,), {"u": (2,), "v": (2, 3), "w": ()}, id="empty batch"),
    pytest.param((2,), {"u": (0,), "v": (2, 0), "w": ()}, id="leaves without unknowns"),
    pytest.param((2,), {"u": (0,), "v": (2, 0)}, id="no unknowns"),
    pytest.param((2,), {"u": (2,)}, id="one leaf"),
]


@pytest.mark.parametrize(("batch", "events"), LEAVES)
@pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy"))]
)
def test_leaves_of_every_shape(
    batch: tuple[int, ...], events: dict[str, tuple[int, ...]], solver: str
) -> None:
    """The same coupled system, its unknowns spread over leaves."""
    event_dims = {name: len(event) for name, event in events.items()}
    counts = [torch.Size(event).numel() for event in events.values()]
    a = torch.randn(*batch, sum(counts), requires_grad=True)

    def join(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [leaf.reshape(*batch, count) for leaf, count in zip(tree.values(), counts, strict=True)], -1
        )

    def conditions(y: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
        pieces = a.split(counts, -1)
        sum_of_all = sum(
            leaf.reshape(*batch, count).sum(-1) for leaf, count in zip(y.values(), counts, strict=True)
        )
        return {
            name: y[name] + y[name] ** 3 / 5
            + 0.1 * sum_of_all.reshape((*batch, *(1 for _ in event))) - piece.reshape((*batch, *event))
            for (name, event), piece in zip(events.items(), pieces, strict=True)
        }  # fmt: skip

    start = {name: torch.zeros((*batch, *event)) for name, event in events.items()}
    y = inv.root(conditions, start, a, event_dims=event_dims, solver=solver, polish=1)
    assert {name: tuple(leaf.shape) for name, leaf in y.items()} == {n: batch + e for n, e in events.items()}
    expected = solve(a, 1)
    torch.testing.assert_close(join(y), expected, **TIGHT)
    ours, theirs = (torch.autograd.grad(v.pow(2).sum(), a)[0] for v in (join(y), expected))
    torch.testing.assert_close(ours, theirs, **TIGHT)


# --- args that are no tensors ---------------------------------------------------------------------------


class Options:
    """Something that only the conditions understand."""

    power = 3


@pytest.mark.parametrize("kind", ["root", "fixed_point", "implicit_function", "in a dict"])
def test_args_that_are_no_tensors(kind: str) -> None:
    """Strings, numbers, None, objects, arrays and functions pass through as they are, also under vmap."""
    extra = ("cubic", 2, 0.5, None, Options(), {"nested": [True, (1j,)]}, torch.sin)

    def conditions(y: Tensor, a: Tensor, *rest: Any) -> Tensor:
        assert all(came is gave for came, gave in zip(rest[:5], extra[:5], strict=True))
        assert (rest[5], rest[6]) == (extra[5], extra[6])
        return y ** rest[4].power + rest[1] * y - rest[6](a) * rest[2]

    def solver(_y0: Any, a: Tensor, *rest: Any) -> Tensor:
        assert rest[0] == "cubic"
        y = torch.zeros_like(a)
        for _ in range(40):
            y = y - (y**3 + 2 * y - a.sin() / 2) / (3 * y**2 + 2)
        return y

    def layer(a: Tensor) -> Tensor:
        start = torch.zeros_like(a)
        if kind == "implicit_function":
            return inv.implicit_function(conditions)(lambda *args: solver(None, *args))(a, *extra)
        if kind == "fixed_point":
            return inv.fixed_point(lambda y, *args: y - conditions(y, *args) / 4, start, (a, *extra))
        if kind == "in a dict":
            wrapped = lambda y, *args: conditions(y["y"], *args)  # noqa: E731
            return inv.root(wrapped, {"y": start}, (a, *extra))["y"]
        return inv.root(conditions, start, (a, *extra), solver=solver)

    a = torch.rand(2, 3, requires_grad=True)
    y = layer(a)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, (a.cos() / 2 / (3 * y**2 + 2)).detach(), **TIGHT)
    torch.testing.assert_close(torch.vmap(layer)(a.detach()), y.detach(), **TIGHT)
    assert torch.autograd.gradgradcheck(layer, a)


@pytest.mark.parametrize(
    "solver", ["torch.newton", lambda y0, a: a.expand_as(y0) ** (1 / 3)], ids=["native", "callable"]
)
def test_mapped_dimension_of_no_size(solver: Any) -> None:
    layer = lambda a: inv.root(lambda y, a: y**3 - a, torch.ones(2), a, solver=solver)  # noqa: E731
    assert torch.vmap(layer)(torch.ones(0, 2)).shape == (0, 2)
    assert torch.vmap(torch.vmap(layer))(torch.ones(3, 0, 2)).shape == (3, 0, 2)
    assert torch.vmap(torch.func.grad(lambda a: layer(a).sum()))(torch.ones(0, 2)).shape == (0, 2)


def test_mapped_dimension_of_no_size_and_no_guess() -> None:
    solve = inv.implicit_function(lambda y, a: y**3 - a)(lambda a: a ** (1 / 3))
    with pytest.raises(inv.UnsupportedTransformError, match="dimension of size 0"):
        torch.vmap(solve)(torch.ones(0, 2))
