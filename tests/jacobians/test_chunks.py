"""Rows of a Jacobian taken a few at a time: the same numbers, and a bound on what one pass holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.memory.tracking import Ops
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

BATCH, N, WIDE = 3, 12, 200
GENERATOR = torch.Generator().manual_seed(0)
INTO = torch.randn(N, WIDE, generator=GENERATOR, dtype=torch.float64) / WIDE**0.5
OUT = torch.randn(WIDE, N, generator=GENERATOR, dtype=torch.float64) / WIDE**0.5
THETA = torch.randn(BATCH, N, generator=GENERATOR, dtype=torch.float64)
COTANGENT = torch.randn(BATCH, N, generator=GENERATOR, dtype=torch.float64)


def network(y: Tensor) -> Tensor:
    """What a pass holds for each row is WIDE numbers a sample, many more than the row itself."""
    return y + 0.3 * torch.tanh(y @ INTO) @ OUT


def conditions(y: Tensor, theta: Tensor) -> Tensor:
    return network(y) - theta


def solved(theta: Tensor, chunk_size: int | None, **settings: Any) -> Tensor:
    adjoint = inv.adjoints.Implicit(chunk_size=chunk_size, **settings)
    result: Tensor = inv.root(conditions, torch.zeros_like(theta), theta, adjoint=adjoint)
    return result


def gradient(chunk_size: int | None, **settings: Any) -> Tensor:
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(solved(theta, chunk_size, **settings), theta, COTANGENT)[0]


def second_derivative(chunk_size: int | None) -> Tensor:
    theta = THETA.clone().requires_grad_()
    (first,) = torch.autograd.grad(solved(theta, chunk_size), theta, COTANGENT, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), theta)[0]


WAYS: dict[str, Callable[[int | None], Tensor]] = {
    "backward": gradient,
    "backward with care": lambda k: gradient(k, singular="consistent"),
    "double backward": second_derivative,
    "jacrev": lambda k: jacrev(lambda t: solved(t, k))(THETA),
    "jacfwd": lambda k: jacfwd(lambda t: solved(t, k))(THETA),
    "vmap": lambda k: vmap(lambda t: solved(t, k))(THETA),
    "torch.newton": lambda k: solved(THETA, k),
    "batch_jacobian": lambda k: inv.batch_jacobian(network, THETA, chunk_size=k),
    "batch_jacobian, full": lambda k: inv.batch_jacobian(network, THETA, method="full", chunk_size=k),
    "batch_jacobian, recorded": lambda k: torch.autograd.grad(
        inv.batch_jacobian(network, (y := THETA.clone().requires_grad_()), create_graph=True, chunk_size=k)
        .pow(3)
        .sum(),
        y,
    )[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk_size", [1, 5, N, 1000])
def test_the_size_of_a_chunk_changes_no_number(way: str, chunk_size: int) -> None:
    torch.testing.assert_close(WAYS[way](chunk_size), WAYS[way](None), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("way", ["backward", "backward with care", "torch.newton", "batch_jacobian"])
@pytest.mark.parametrize("chunk_size", [1, 4, 12])
def test_no_more_rows_at_once_than_asked_for(way: str, chunk_size: int) -> None:
    with Ops() as ops:
        WAYS[way](chunk_size)
    rows = ops.largest / (BATCH * WIDE)
    assert rows == max(chunk_size, N * N / WIDE)  # the blocks themselves are there in the end


def test_the_full_jacobian_is_never_there_as_a_whole() -> None:
    with Ops() as ops:
        WAYS["batch_jacobian, full"](2)
    assert ops.largest == max(2 * BATCH * WIDE, BATCH * N * N)


@pytest.mark.parametrize("method", ["fast", "full"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_take(method: Any, shape: tuple[int, int]) -> None:
    jacobian = inv.batch_jacobian(torch.sin, torch.zeros(shape), method=method, chunk_size=1)
    assert jacobian.shape == (*shape, shape[1])


def test_large_batches_are_divided_without_being_asked() -> None:
    """A row of this value is 768 KiB, and a pass takes 1 MiB on a CPU."""
    y = torch.zeros(8192, N)
    with Ops() as ops:
        jacobian = inv.batch_jacobian(torch.sin, y)
    assert jacobian.shape == (8192, N, N)
    rows = N * y.numel()
    assert ops.sizes[rows + y.numel()] + ops.sizes[rows] <= 2  # cotangents and rows; no intermediate result


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "8"])
def test_what_is_no_number_of_rows(wrong: Any) -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"Implicit\(chunk_size=.*an integer >= 1, the number of rows"
    ):
        inv.adjoints.Implicit(chunk_size=wrong)
    with pytest.raises(inv.ConditionsError, match=r"batch_jacobian\(chunk_size=.*an integer >= 1"):
        inv.batch_jacobian(network, THETA, chunk_size=wrong)


def test_compiled_derivatives_take_all_rows_at_once() -> None:
    theta = THETA.clone().requires_grad_()
    adjoint = inv.adjoints.Implicit(chunk_size=4)
    y = inv.root(conditions, torch.zeros_like(theta), theta, adjoint=adjoint, compile=True)
    with pytest.warns(inv.PerformanceWarning, match=r"compile=True.*all rows.*chunk_size= was given"):
        (ours,) = torch.autograd.grad(y, theta, COTANGENT)
    torch.testing.assert_close(ours, gradient(None), rtol=1e-13, atol=1e-13)
