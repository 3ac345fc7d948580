"""Batched LU: right at every size, thread count and order of differentiation."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.opaque import gauss_jordan
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from invlayer_core.linear.lu import lu_factor, lu_solve

pytestmark = pytest.mark.usefixtures("float64")


def regular(*shape: int) -> Tensor:
    return torch.randn(*shape, shape[-1]) / shape[-1] ** 0.5 + 2 * torch.eye(shape[-1])


def solve(blocks: Tensor, rhs: Tensor, transpose: bool = False) -> Tensor:
    return lu_solve(blocks, rhs, lu_factor(blocks.detach()), transpose=transpose)


TRANSPOSE = pytest.mark.parametrize("transpose", [False, True], ids=["A", "Aᵀ"])


def expected(blocks: Tensor, rhs: Tensor, transpose: bool) -> Tensor:
    return gauss_jordan(blocks.mT if transpose else blocks, rhs)


@TRANSPOSE
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 3), (5, 3), (3, 5), (3, 3), (0, 3)])
def test_solves(shape: tuple[int, int], transpose: bool) -> None:
    """Also where the batch is as large as the system: right-hand sides are vectors, never a matrix."""
    blocks, rhs = regular(*shape), torch.randn(shape)
    ours = solve(blocks, rhs, transpose)
    assert ours.shape == shape
    torch.testing.assert_close(ours, expected(blocks, rhs, transpose), rtol=1e-12, atol=1e-12)


@TRANSPOSE
def test_needs_pivoting(transpose: bool) -> None:
    blocks = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[1e-20, 1.0], [1.0, 1.0]]])
    rhs = torch.tensor([[2.0, 3.0], [1.0, 2.0]])
    exact = torch.linalg.inv(blocks.mT if transpose else blocks) @ rhs.unsqueeze(-1)
    torch.testing.assert_close(solve(blocks, rhs, transpose), exact.squeeze(-1))


@TRANSPOSE
def test_derivatives_of_both_arguments(transpose: bool) -> None:
    inputs = regular(2, 3).requires_grad_(), torch.randn(2, 3, requires_grad=True)
    function = lambda blocks, rhs: solve(blocks, rhs, transpose)  # noqa: E731
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@TRANSPOSE
@pytest.mark.parametrize(
    ("outer", "inner"),
    [(jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd)],
    ids=["jacrev(jacrev)", "jacfwd(jacrev)", "jacrev(jacfwd)"],
)
def test_second_order(outer: Any, inner: Any, transpose: bool) -> None:
    """(For jacfwd(jacfwd) the adjoint takes Newton steps, and does not come here.)"""
    blocks, rhs = regular(1, 3), torch.randn(1, 3)
    second = lambda f: outer(inner(lambda b, r: f(b, r, transpose), (0, 1)), (0, 1))(blocks, rhs)  # noqa: E731
    torch.testing.assert_close(second(solve), second(expected), rtol=1e-10, atol=1e-11)


def test_third_order() -> None:
    blocks = regular(1, 2)

    def third(f: Any) -> Tensor:
        loss = lambda b: f(b, b[:, 0], False).sin().sum()  # noqa: E731
        return jacrev(hessian(loss))(blocks)

    torch.testing.assert_close(third(solve), third(expected), rtol=1e-9, atol=1e-10)


@TRANSPOSE
def test_mapped_in_every_way(transpose: bool) -> None:
    blocks, rhs = regular(4, 2, 3), torch.randn(4, 2, 3)
    whole = expected(blocks, rhs, transpose)
    one = lambda b, r: solve(b, r, transpose)  # noqa: E731
    torch.testing.assert_close(vmap(one)(blocks, rhs), whole)
    torch.testing.assert_close(
        vmap(one, (None, 0))(blocks[0], rhs), expected(blocks[:1].expand_as(blocks), rhs, transpose)
    )
    table = expected(blocks[:, None], rhs[None], transpose)
    nested = vmap(vmap(one, (None, 0)), (0, None))(blocks, rhs)  # blocks outside, right-hand sides inside
    torch.testing.assert_close(nested, table)
    swapped = vmap(vmap(one, (0, None)), (None, 0))(blocks, rhs)
    torch.testing.assert_close(swapped, table.transpose(0, 1))


def test_gradient_of_a_mapped_solve() -> None:
    blocks, rhs = regular(4, 1, 3), torch.randn(1, 3)
    per_sample = lambda f: vmap(grad(lambda b: f(b, rhs, False).sin().sum()))(blocks)  # noqa: E731
    torch.testing.assert_close(per_sample(solve), per_sample(expected))


def test_singular_block_is_reported_and_alone() -> None:
    blocks = regular(4, 3)
    blocks[1, :, 2] = 0
    rhs = torch.randn(4, 3)
    factors = lu_factor(blocks)
    assert (factors.info != 0).tolist() == [False, True, False, False]
    ours = lu_solve(blocks, rhs, factors)
    assert not ours[1].isfinite().all()
    for i in (0, 2, 3):
        assert torch.equal(ours[i], solve(blocks[i : i + 1], rhs[i : i + 1])[0])


def test_nan_block_stays_alone() -> None:
    blocks, rhs = regular(3, 4), torch.randn(3, 4)
    blocks[1, 2, 2] = torch.nan
    ours = solve(blocks, rhs)
    assert ours[1].isnan().any()
    assert torch.equal(ours[[0, 2]], solve(blocks[[0, 2]], rhs[[0, 2]]))


def test_factors_are_constants() -> None:
    blocks = regular(2, 3).requires_grad_()
    assert not any(part.requires_grad for part in lu_factor(blocks))


# --- sizes at which torch's own batched LU hangs or returns garbage -------------------------------------

SCRIPT = """
import sys, threading, torch
import invlayer_core as inv
from invlayer_core.linear.lu import lu_factor, lu_solve
torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)
torch.manual_seed(0)
n, batch = {n}, 4
blocks = torch.randn(batch, n, n) / n**0.5 + 2 * torch.eye(n)
rhs = torch.randn(batch, n)

def conditions(y, a):
    return (blocks @ y.unsqueeze(-1)).squeeze(-1) + 0.1 * y**3 - a

def one(y, a):
    return blocks[0] @ y + 0.1 * y**3 - a

def check(ours, theirs):
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < 1e-11, error

exact = torch.stack([torch.linalg.solve(block, right) for block, right in zip(blocks, rhs)])
{body}
assert torch.get_num_threads() == 2
print("done")
"""

BODIES = {
    "factor": "check(lu_solve(blocks, rhs, lu_factor(blocks)), exact)",
    "worker thread": (
        "results = []\n"
        "worker = threading.Thread(target=lambda: results.append(lu_solve(blocks, rhs, lu_factor(blocks))))\n"
        "worker.start(); worker.join()\n"
        "check(results[0], exact)"
    ),
    "backward": (
        "a = rhs.clone().requires_grad_()\n"
        "y = inv.root(conditions, torch.zeros(batch, n), args=a)\n"
        "(ours,) = torch.autograd.grad(y.sum(), a)\n"
        "full = blocks + torch.diag_embed(0.3 * y.detach() ** 2)\n"
        "check(ours, torch.stack([torch.linalg.solve(block.T, torch.ones(n)) for block in full]))"
    ),
    "vmap(grad)": (
        "layer = lambda a: inv.root(one, torch.zeros(n), args=a)\n"
        "ours = torch.vmap(torch.func.grad(lambda a: layer(a).sum()))(rhs)\n"
        "y = torch.stack([layer(right) for right in rhs])\n"
        "full = blocks[0] + torch.diag_embed(0.3 * y**2)\n"
        "check(ours, torch.stack([torch.linalg.solve(block.T, torch.ones(n)) for block in full]))"
    ),
    "nested forward mode": (
        "layer = lambda a: inv.root(conditions, torch.zeros(batch, n), args=a)\n"
        "once = lambda a: torch.func.jvp(layer, (a,), (rhs,))[1]\n"
        "ours = torch.func.jvp(once, (rhs,), (rhs,))[1]\n"
        "h = 1e-4\n"
        "error = ((once(rhs + h * rhs) - once(rhs - h * rhs)) / (2 * h) - ours).abs().max()\n"
        "assert float(error) < 1e-5 * float(ours.abs().max()), error"
    ),
    "mapped nested forward mode": (
        "layer = lambda a: inv.root(one, torch.zeros(n), args=a)\n"
        "once = lambda a: torch.func.jvp(layer, (a,), (rhs[1],))[1]\n"
        "twice = lambda a: torch.func.jvp(once, (a,), (rhs[2],))[1]\n"
        "check(torch.vmap(twice)(rhs), torch.stack([twice(a) for a in rhs]))"
    ),
    "damped": (
        "from invlayer_core.linear.singular import damped_solution\n"
        "check(damped_solution(blocks, rhs, 0.0, transpose=False), exact)"
    ),
}


def run_guarded(n: int, body: str) -> None:
    """In a process of its own, as the failure it guards against is a hang."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(n=n, body=body)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "done"
    assert "oneMKL ERROR" not in ran.stdout + ran.stderr


ALL = "\n".join(BODIES[name] for name in ("factor", "worker thread", "backward"))


@pytest.mark.parametrize("n", [150, pytest.param(200, marks=pytest.mark.slow)])
def test_large_batches_with_two_threads(n: int) -> None:
    run_guarded(n, ALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vmap(grad)", "nested forward mode", "mapped nested forward mode", "damped"],
)
def test_every_way_to_lu_is_guarded(name: str) -> None:
    run_guarded(160, BODIES[name])


def test_worker_threads_leave_the_thread_count_alone() -> None:
    seen = []

    def work(_: int) -> Tensor:
        blocks = regular(2, 151)
        result = lu_factor(blocks).factors
        seen.append(torch.get_num_threads())
        return result

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(4)))
    assert len(results) == 4
    assert set(seen) == {torch.get_num_threads()}
