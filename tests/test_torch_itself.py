"""Defects of torch that the engine works around: a test that starts to pass here says that a fix has come.

Each is strict: when torch is repaired, the xfail turns into a failure, and the workaround may go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

pytestmark = pytest.mark.usefixtures("float64")


def matrix_of(p: Tensor) -> Tensor:
    """Depends on p to second order."""
    return torch.eye(2) * 2 + p.unsqueeze(-1) * p.roll(1)


def by_cramer(p: Tensor) -> Tensor:
    """A(p)⁻¹ p for 2×2 blocks, by plain arithmetic."""
    (a, b), (c, d) = (row.unbind() for row in matrix_of(p).unbind())
    return torch.stack([d * p[0] - b * p[1], a * p[1] - c * p[0]]) / (a * d - b * c)


def by_linalg_solve(p: Tensor) -> Tensor:
    return torch.linalg.solve(matrix_of(p), p.unsqueeze(-1)).squeeze(-1)


WRONG = pytest.mark.xfail(strict=True, reason="torch 2.13: wrong second derivative of linalg.solve")


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        pytest.param(jacrev, jacrev, id="jacrev(jacrev)"),
        pytest.param(jacfwd, jacrev, id="jacfwd(jacrev)"),
        pytest.param(jacrev, jacfwd, id="jacrev(jacfwd)", marks=WRONG),
        pytest.param(jacfwd, jacfwd, id="jacfwd(jacfwd)", marks=WRONG),
    ],
)
def test_linalg_solve_to_second_order(outer: Any, inner: Any) -> None:
    p = torch.tensor([0.7, -0.4])
    torch.testing.assert_close(outer(inner(by_linalg_solve))(p), jacrev(jacrev(by_cramer))(p))


@pytest.mark.xfail(strict=True, reason="torch 2.13: lu_solve is wrong if LU is mapped outside and B inside")
def test_lu_solve_under_nested_vmap() -> None:
    blocks, right = torch.rand(3, 2, 2) + torch.eye(2), torch.rand(4, 2, 1)
    factors, pivots, _ = torch.linalg.lu_factor_ex(blocks)
    table = vmap(lambda lu, p: vmap(lambda b: torch.linalg.lu_solve(lu, p, b))(right))(factors, pivots)
    torch.testing.assert_close(table, torch.linalg.inv(blocks)[:, None] @ right)


class Cube(torch.autograd.Function):
    """x³ with every rule that torch asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return Slope.apply(ctx.saved_tensors[0], cotangent)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class Slope(torch.autograd.Function):
    """3x²c: what a Function in the backward of a Function is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cotangent: Tensor) -> Tensor:
        return 3 * x**2 * cotangent

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor, Tensor]:
        x, cotangent = ctx.saved_tensors
        return 6 * x * cotangent * change, 3 * x**2 * change


@pytest.mark.xfail(strict=True, reason="torch 2.13: a custom jvp rule runs with forward mode switched off")
def test_nested_forward_mode_through_a_custom_jvp() -> None:
    second = jacfwd(jacfwd(lambda x: Cube.apply(x)))(torch.tensor(2.0))
    torch.testing.assert_close(second, torch.tensor(12.0))


def test_nested_forward_mode_through_a_custom_jvp_is_silently_zero() -> None:
    """It does not raise, which is why the engine may not rely on the rule."""
    assert float(jacfwd(jacfwd(lambda x: Cube.apply(x)))(torch.tensor(2.0))) == 0


def rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(f(x), x, torch.eye(3), is_grads_batched=True, create_graph=True)[0]


@pytest.mark.xfail(
    strict=True, reason="torch 2.13: a Function applied to batched cotangents leaves the graph"
)
def test_second_derivative_through_batched_cotangents() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (second,) = torch.autograd.grad(rows(Cube.apply, x).sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())
