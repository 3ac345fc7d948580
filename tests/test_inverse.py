"""y = g(x) differentiated through its inverse f, and batch_jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core import Status
from invlayer_core.adjoints import Implicit

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-12, "atol": 1e-12}


# --- known inverses -------------------------------------------------------------------------------------

L1, L2 = 1.0, 0.7


def hand(angles: Tensor) -> Tensor:
    """Where a planar arm of two links ends."""
    first, both = angles[..., 0], angles.sum(-1)
    return torch.stack([L1 * first.cos() + L2 * both.cos(), L1 * first.sin() + L2 * both.sin()], -1)


def arm(position: np.ndarray) -> np.ndarray:
    """The angles, elbow down, by the law of cosines."""
    x, y = position[..., 0], position[..., 1]
    second = np.arccos((x**2 + y**2 - L1**2 - L2**2) / (2 * L1 * L2))
    first = np.arctan2(y, x) - np.arctan2(L2 * np.sin(second), L1 + L2 * np.cos(second))
    return np.stack([first, second], -1)


def arm_derivative(angles: Tensor) -> Tensor:
    """Closed form, Craig, Introduction to Robotics, chapter 5: adj(J) / (l₁ l₂ sin θ₂)."""
    first, both, second = angles[..., 0], angles.sum(-1), angles[..., 1]
    rows = [
        [L2 * both.cos(), L2 * both.sin()],
        [-L1 * first.cos() - L2 * both.cos(), -L1 * first.sin() - L2 * both.sin()],
    ]
    adjugate = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return adjugate / (L1 * L2 * second.sin())[..., None, None]


ANGLES = torch.tensor([[0.3, 1.2], [-0.8, 0.5], [2.0, 2.2]], dtype=torch.float64)
SCALARS = torch.tensor([[0.9], [0.1], [0.5]], dtype=torch.float64)

# name: (g, f, x, dy/dx, d²y/dx² or None)
KNOWN: dict[str, tuple[Any, Any, Tensor, Tensor, Tensor | None]] = {
    "asin": (np.arcsin, torch.sin, SCALARS, (1 - SCALARS**2) ** -0.5, SCALARS * (1 - SCALARS**2) ** -1.5),
    "acos": (np.arccos, torch.cos, SCALARS, -((1 - SCALARS**2) ** -0.5), -SCALARS * (1 - SCALARS**2) ** -1.5),
    "sqrt": (np.sqrt, torch.square, SCALARS, 0.5 * SCALARS**-0.5, -0.25 * SCALARS**-1.5),
    "arm": (arm, hand, hand(ANGLES), arm_derivative(ANGLES), None),
}
EVERY_KNOWN = pytest.mark.parametrize(("g", "f", "x", "first", "second"), KNOWN.values(), ids=KNOWN)


def blocks_of(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """∂f/∂y of every sample, for ``(*batch, n)``."""
    return lambda y: vmap(jacrev(f))(y) if y.ndim == 2 else jacrev(f)(y)


def given(how: str, f: Any, g: Any, x: Tensor) -> dict[str, Any]:
    if how == "f":
        return {"f": f}
    blocks = blocks_of(f)
    return {"jacobian": blocks if how == "callable" else blocks(torch.from_numpy(g(x.detach().numpy())))}


HOW = pytest.mark.parametrize("how", ["f", "callable", "tensor"])


@EVERY_KNOWN
@HOW
def test_gradient_against_the_closed_form(
    g: Any, f: Any, x: Tensor, first: Tensor, second: Any, how: str
) -> None:
    x = x.clone().requires_grad_()
    y = inv.inverse(x, inv.from_numpy(g), **given(how, f, g, x))
    assert torch.equal(y.detach(), torch.from_numpy(g(x.detach().numpy())))
    n = x.shape[-1]
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(n)]
    torch.testing.assert_close(torch.stack(rows, 1), first.reshape(3, n, n), **EXACT)


@EVERY_KNOWN
@HOW
def test_forward_mode_against_the_closed_form(
    g: Any, f: Any, x: Tensor, first: Tensor, second: Any, how: str
) -> None:
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        y = inv.inverse(forward_ad.make_dual(x, tangent), inv.from_numpy(g), **given(how, f, g, x))
        moved = forward_ad.unpack_dual(y).tangent
    expected = (first.reshape(3, x.shape[-1], -1) @ tangent.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(moved.detach(), expected, **EXACT)


@pytest.mark.parametrize("how", ["f", "callable"])
@pytest.mark.parametrize("name", ["asin", "acos", "sqrt"])
def test_second_derivative_against_the_closed_form(name: str, how: str) -> None:
    g, f, x, _, second = KNOWN[name]
    x = x.clone().requires_grad_()
    y = inv.inverse(x, inv.from_numpy(g), **given(how, f, g, x))
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], second, **EXACT)


@pytest.mark.parametrize("how", ["f", "callable"])
def test_arm_to_second_order(how: str) -> None:
    g, f, x, _, _ = KNOWN["arm"]
    layer = lambda x: inv.inverse(x, inv.from_numpy(g), **given(how, f, g, x))  # noqa: E731
    assert gradcheck(layer, x.clone().requires_grad_(), check_forward_ad=True)
    assert gradgradcheck(layer, x.clone().requires_grad_())


@HOW
def test_g_is_called_exactly_once(how: str) -> None:
    g, f, x, _, _ = KNOWN["arm"]
    calls = []

    def counted(x: np.ndarray) -> np.ndarray:
        calls.append(x.shape)
        return g(x)

    x = x.clone().requires_grad_()
    y = inv.inverse(x, inv.from_numpy(counted), **given(how, f, g, x))
    torch.autograd.grad(y.sum(), x, retain_graph=True, create_graph=how != "tensor")
    torch.autograd.grad(y.sum(), x)
    assert calls == [(3, 2)]


def test_f_is_called_once_forward_and_once_per_backward() -> None:
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(y.shape)
        return torch.sin(y)

    x = SCALARS.clone().requires_grad_()
    y = inv.inverse(x, torch.asin, f=f)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (2, 3, 2), (1, 2)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = (0.1 + 0.5 * torch.rand(shape)).requires_grad_()
    y = inv.inverse(x, torch.asin, f=torch.sin, event_dims=min(1, len(shape)))
    assert y.shape == x.shape
    (ours,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ours, (1 - x.detach() ** 2) ** -0.5, **EXACT)


# --- what the verdict is --------------------------------------------------------------------------------


def test_wrong_inverse_is_caught() -> None:
    x = SCALARS.clone().requires_grad_()
    with pytest.raises(inv.ConvergenceError, match=r"acos: 3 of 3 samples(?s:.*)FALSE_CONVERGENCE"):
        inv.inverse(x, torch.acos, f=torch.sin)


@pytest.mark.parametrize("how", ["callable", "tensor"])
def test_with_a_jacobian_alone_nothing_is_verified(how: str) -> None:
    g, f, x, _, _ = KNOWN["asin"]
    _, info = inv.inverse(x, inv.from_numpy(g), **given(how, f, g, x), return_info=True)
    assert info.status == (Status.UNVERIFIED,) * 3
    assert bool(info.ok.all())
    assert bool(info.residual.isnan().all())


def test_nan_is_seen_even_so() -> None:
    x = torch.tensor([[0.5], [2.0]])
    with pytest.raises(inv.ConvergenceError, match=r"1 of 2 samples(?s:.*)sample 1: NOT_FINITE"):
        inv.inverse(x, torch.asin, jacobian=lambda y: torch.diag_embed(torch.cos(y)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({}, "got neither f= nor jacobian="), ({"f": torch.sin, "jacobian": torch.eye(1)}, "got both")],
    ids=["neither", "both"],
)
def test_exactly_one_of_f_and_jacobian(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        inv.inverse(SCALARS, torch.asin, **keywords)


@pytest.mark.parametrize("how", ["callable", "tensor"])
@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 1), (2, 1, 1)])
def test_jacobian_of_a_wrong_shape(shape: tuple[int, ...], how: str) -> None:
    wrong = torch.ones(shape) if how == "tensor" else lambda y: torch.ones(shape)
    x = SCALARS.clone().requires_grad_()
    y = inv.inverse(x, torch.asin, jacobian=wrong)
    with pytest.raises(
        inv.ConditionsError, match=r"jacobian= returned a tensor of shape .*, of shape \(3, 1, 1\)"
    ):
        y.sum().backward()


# --- a constant Jacobian has no second derivative -------------------------------------------------------


def constant(x: Tensor) -> Tensor:
    return inv.inverse(
        x, torch.asin, jacobian=torch.diag_embed(torch.cos(torch.asin(torch.tensor([0.3, 0.6]))))
    )


def test_constant_jacobian_refuses_double_backward() -> None:
    x = torch.tensor([0.3, 0.6], requires_grad=True)
    (first,) = torch.autograd.grad(constant(x).sum(), x, create_graph=True)
    torch.testing.assert_close(first.detach(), (1 - x.detach() ** 2) ** -0.5, **EXACT)
    with pytest.raises(inv.UnsupportedTransformError, match="differentiated twice, but a constant J"):
        torch.autograd.grad(first.sum(), x)


ESCAPES = pytest.mark.xfail(strict=True, reason="an internal assertion of torch (escaped tensor) comes first")


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        pytest.param(jacrev, jacrev, id="jacrev(jacrev)"),
        pytest.param(jacrev, jacfwd, id="jacrev(jacfwd)"),
        pytest.param(jacfwd, jacrev, id="jacfwd(jacrev)", marks=ESCAPES),
        pytest.param(jacfwd, jacfwd, id="jacfwd(jacfwd)"),
    ],
)
def test_constant_jacobian_refuses_second_order_in_torch_func(outer: Any, inner: Any) -> None:
    x = torch.tensor([0.3, 0.6])
    torch.testing.assert_close(inner(constant)(x), torch.diag((1 - x**2) ** -0.5), **EXACT)
    with pytest.raises(inv.UnsupportedTransformError, match="differentiated twice, but a constant J"):
        outer(inner(constant))(x)


@ESCAPES
def test_constant_jacobian_refuses_a_hessian() -> None:
    with pytest.raises(inv.UnsupportedTransformError, match="differentiated twice, but a constant J"):
        hessian(lambda x: constant(x).pow(2).sum())(torch.tensor([0.3, 0.6]))


def test_constant_jacobian_serves_a_gradient_penalty_of_nothing() -> None:
    """create_graph alone asks for no second derivative; only its use does."""
    x = torch.tensor([0.3, 0.6], requires_grad=True)
    (first,) = torch.autograd.grad(constant(x).sum(), x, create_graph=True)
    assert first.requires_grad


# --- f that is not square -------------------------------------------------------------------------------


def wide(y: Tensor) -> Tensor:
    """Three unknowns, two values: g is a right inverse."""
    return torch.stack([y[..., 0] + y[..., 1] ** 2, y[..., 1] * y[..., 2]], -1)


def tall(y: Tensor) -> Tensor:
    """Two unknowns, three values: x has to lie on a surface."""
    return torch.stack([y[..., 0], y[..., 1] ** 2, y[..., 0] * y[..., 1]], -1)


RECTANGULAR = {
    "wide": (
        wide,
        torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 2.0]], dtype=torch.float64),
        "2 equations for 3",
    ),
    "tall": (tall, torch.tensor([[1.0, 2.0], [0.3, -1.0]], dtype=torch.float64), "3 equations for 2"),
}
EVERY_RECTANGULAR = pytest.mark.parametrize(("f", "y", "message"), RECTANGULAR.values(), ids=RECTANGULAR)


@EVERY_RECTANGULAR
def test_not_square_is_a_clear_error(f: Any, y: Tensor, message: str) -> None:
    x = f(y).requires_grad_()
    ours = inv.inverse(x, lambda x: y, f=f)
    with pytest.raises(inv.ConditionsError, match=f"{message} unknowns(?s:.*)singular='lstsq'"):
        ours.sum().backward()


@EVERY_RECTANGULAR
def test_not_square_has_a_least_squares_answer(f: Any, y: Tensor, message: str) -> None:
    x = f(y).requires_grad_()
    ours = inv.inverse(x, lambda x: y, f=f, adjoint=Implicit(singular="lstsq"))
    cotangent = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(ours, x, cotangent)
    pseudo = torch.linalg.pinv(vmap(jacrev(f))(y))
    torch.testing.assert_close(gradient, (pseudo.mT @ cotangent.unsqueeze(-1)).squeeze(-1), **EXACT)


@EVERY_RECTANGULAR
def test_not_square_in_forward_mode(f: Any, y: Tensor, message: str) -> None:
    x, tangent = f(y), torch.randn_like(f(y))
    layer = lambda x: inv.inverse(x, lambda x: y, f=f, adjoint=Implicit(singular="lstsq"))  # noqa: E731
    moved = torch.func.jvp(layer, (x,), (tangent,))[1]
    pseudo = torch.linalg.pinv(vmap(jacrev(f))(y))
    torch.testing.assert_close(moved, (pseudo @ tangent.unsqueeze(-1)).squeeze(-1), **EXACT)


# --- f that mixes samples -------------------------------------------------------------------------------


def normalised() -> tuple[nn.Module, Tensor, Tensor]:
    norm = nn.BatchNorm1d(2, track_running_stats=False).train()  # torch.func allows no in-place statistics
    y = torch.randn(4, 2)
    return norm, y, (y + norm(y) ** 2 / 4).detach().requires_grad_()


def test_coupled_f_is_refused_by_name() -> None:
    norm, y, x = normalised()
    ours = inv.inverse(x, lambda x: y, f=lambda y: y + norm(y) ** 2 / 4)
    message = r"mix the samples of the batch \(4,\)(?s:.*)with event_dims=2"
    with pytest.raises(inv.ConditionsError, match=message):
        ours.pow(2).sum().backward()


def push_forward(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


def pull_back_twice(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.requires_grad_()
    torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)


DERIVATIVES: dict[str, Any] = {
    "eager jvp": push_forward,
    "double backward": pull_back_twice,
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "vmap(jacrev)": lambda layer, x: vmap(jacrev(layer))(x.expand(2, 4, 2)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_coupled_f_is_refused_by_every_derivative(derivative: Any) -> None:
    norm, y, x = normalised()
    layer = lambda x: inv.inverse(x, lambda x: y, f=lambda y: y + norm(y) ** 2 / 4)  # noqa: E731
    with pytest.raises(inv.ConditionsError, match="mix the samples"):
        derivative(layer, x.detach())


@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-6])
def test_weakly_coupled_f_is_refused(weight: float) -> None:
    y = torch.randn(5, 2)
    f = lambda y: y**3 + y + weight * y.mean(0)  # noqa: E731
    ours = inv.inverse(f(y).requires_grad_(), lambda x: y, f=f)
    with pytest.raises(inv.ConditionsError, match="mix the samples"):
        ours.pow(2).sum().backward()


@pytest.mark.parametrize("period", [1, 2, 3, 4])
@pytest.mark.parametrize("create_graph", [False, True])
def test_samples_coupled_in_pairs_are_refused(period: int, create_graph: bool) -> None:
    """Equal samples and an even cotangent hide nothing."""
    y = torch.tensor([[0.5, -0.3]]).expand(8, 2).clone()
    f = lambda y: y**3 + y + 0.1 * y.roll(period, 0) ** 2  # noqa: E731
    x = f(y).requires_grad_()
    ours = inv.inverse(x, lambda x: y, f=f)
    with pytest.raises(inv.ConditionsError, match="mix the samples"):
        torch.autograd.grad(ours.sum(), x, create_graph=create_graph)


def test_coupled_f_as_one_system() -> None:
    norm, y, x = normalised()
    f = lambda y: y + norm(y) ** 2 / 4  # noqa: E731
    ours = inv.inverse(x, lambda x: y, f=f, event_dims=2)
    cotangent = torch.randn(4, 2)
    (gradient,) = torch.autograd.grad(ours, x, cotangent)
    dense = jacrev(f)(y).reshape(8, 8)
    expected = torch.linalg.solve(dense.mT, cotangent.reshape(8, 1)).reshape(4, 2)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_independent_f_with_internal_rounding_is_not_refused() -> None:
    """A linear solve inside f loses eight digits of every derivative; the samples stay independent."""
    index = torch.arange(6, dtype=torch.float64)
    hilbert = 1 / (index[:, None] + index + 1)
    y = torch.rand(3, 6)
    f = lambda y: torch.linalg.solve(hilbert, (y + y**3).mT).mT  # noqa: E731
    x = f(y).detach().requires_grad_()
    inv.inverse(x, lambda x: y, f=f).sum().backward()
    expected = hilbert.sum(0) * 0 + (1 / (1 + 3 * y**2)) @ hilbert
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-8)


def test_independent_samples_of_very_different_size_are_not_refused() -> None:
    scale = torch.tensor([[1e-12], [1.0], [1e12]])
    y = torch.randn(3, 2)
    f = lambda y: scale * (y + y**3 + 0.1 * y.flip(-1))  # noqa: E731
    x = f(y).requires_grad_()
    ours = inv.inverse(x, lambda x: y, f=f, atol=1e6)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    blocks = scale.unsqueeze(-1) * (torch.diag_embed(1 + 3 * y**2) + torch.tensor([[0, 0.1], [0.1, 0]]))
    expected = torch.linalg.inv(blocks).sum(1)
    torch.testing.assert_close(gradient * scale, expected * scale, **EXACT)


# --- batch_jacobian -------------------------------------------------------------------------------------


def mix(y: Tensor) -> Tensor:
    """(B, 2, 3) -> (B, 4), nonlinear, samples alone."""
    flat = y.flatten(1)
    return torch.stack([flat.prod(1), flat.sin().sum(1), flat[:, 0] * flat[:, 5], flat[:, 2].exp()], 1)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "square": (lambda y: y**3 + y.roll(1, -1), (5, 3)),
    "tall": (tall, (4, 2)),
    "wide": (wide, (4, 3)),
    "elementwise": (torch.exp, (6,)),
    "matrix": (mix, (3, 2, 3)),
    "to a matrix": (lambda y: y[:, :, None] * y[:, None, :], (3, 2)),
    "to a scalar": (lambda y: y.pow(2).sum(1), (3, 4)),
    "one sample": (lambda y: y**3 + y.roll(1, -1), (1, 4)),
    "constant": (lambda y: torch.ones(3, 2), (3, 2)),
    "partly constant": (lambda y: torch.stack([y[:, 0], torch.ones(3)], 1), (3, 2)),
    "linear": (lambda y: y @ torch.arange(6.0).reshape(2, 3), (5, 2)),
    "no sample": (lambda y: y**2, (0, 3)),
}
EVERY_FUNCTION = pytest.mark.parametrize(("f", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)


@EVERY_FUNCTION
def test_batch_jacobian_fast_and_full_agree_with_torch_func(f: Any, shape: tuple[int, ...]) -> None:
    y = torch.randn(shape)
    fast, full = inv.batch_jacobian(f, y), inv.batch_jacobian(f, y, method="full")
    m, n = f(y).shape[1:].numel(), y.shape[1:].numel()
    assert fast.shape == full.shape == (shape[0], m, n)
    torch.testing.assert_close(fast, full, **EXACT)
    if shape[0]:
        whole = jacrev(f)(y).reshape(shape[0], m, shape[0], n)
        torch.testing.assert_close(fast, whole.diagonal(dim1=0, dim2=2).movedim(-1, 0), **EXACT)


def test_batch_jacobian_is_differentiable_on_demand() -> None:
    y = torch.randn(3, 2, 3, requires_grad=True)
    assert not inv.batch_jacobian(mix, y).requires_grad
    for method in ("fast", "full"):
        blocks = inv.batch_jacobian(mix, y, method=method, create_graph=True)
        (ours,) = torch.autograd.grad(blocks.sin().sum(), y)
        oracle = vmap(jacrev(lambda y: mix(y[None])[0]))(y).reshape(3, 4, 6)
        (expected,) = torch.autograd.grad(oracle.sin().sum(), y)
        torch.testing.assert_close(ours, expected, **EXACT)


def test_batch_jacobian_refuses_to_mix_samples() -> None:
    y = torch.randn(4, 3)
    f = lambda y: y**2 + y.mean(0)  # noqa: E731
    with pytest.raises(inv.ConditionsError, match="mix the samples"):
        inv.batch_jacobian(f, y)
    full = inv.batch_jacobian(f, y, method="full")
    torch.testing.assert_close(full, torch.diag_embed(2 * y + 0.25), **EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: inv.batch_jacobian(torch.sin, torch.tensor(1.0)),
            r"y has shape \(\); accepted is \(B, \*event\)",
        ),
        (
            lambda: inv.batch_jacobian(torch.sin, torch.ones(2, 2), method="slow"),
            "accepted are 'fast' and 'full'",
        ),
        (lambda: inv.batch_jacobian(lambda y: y.sum(), torch.ones(2, 2)), r"returned shape \(\)"),
        (lambda: inv.batch_jacobian(lambda y: y[:1], torch.ones(2, 2)), r"returned shape \(1, 2\)"),
        (lambda: inv.batch_jacobian(torch.sin, torch.ones(2, 2).long()), r"dtype torch\.int64"),
        (lambda: inv.batch_jacobian(torch.sin, np.ones((2, 2))), "y is a ndarray"),
        (lambda: inv.batch_jacobian(lambda y: y.detach().numpy(), torch.ones(2, 2)), "returned ndarray"),
    ],
    ids=["scalar", "method", "reduced", "row", "integer", "NumPy", "to NumPy"],
)
def test_batch_jacobian_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        call()


def test_batch_jacobian_leaves_y_alone() -> None:
    y = torch.randn(3, 2)
    inv.batch_jacobian(torch.sin, y)
    assert not y.requires_grad
