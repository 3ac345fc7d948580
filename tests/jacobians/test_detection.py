"""Detected patterns, and compressed values beside dense Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.conditions.system import System
from invlayer_core.jacobians import SparsityPattern, detect_sparsity
from invlayer_core.jacobians.compressed import check_explains, compressed_values
from invlayer_core.jacobians.linearize import Linearization, linearize
from invlayer_core.structure import Arguments, SystemShape

pytestmark = pytest.mark.usefixtures("float64")


def poisson(y: Tensor) -> Tensor:
    """A five-point stencil on a 9 × 7 grid, and y³."""
    grid = y.reshape(*y.shape[:-1], 9, 7)
    p = torch.nn.functional.pad(grid, (1, 1, 1, 1))
    sums = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
    return (4 * grid - sums).reshape(y.shape) + y**3


def matrix(n: int, m: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    kept = torch.rand(m, n, generator=generator) < share
    return torch.where(kept, torch.randn(m, n, generator=generator).double(), 0.0)


RANDOM, WIDE = matrix(50, 50, 0.05), matrix(60, 40, 0.1)
CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "stencil": (poisson, 63),
    "upwind, not symmetric": (lambda y: y**2 - y.roll(1, -1) + 0.1 * y.roll(3, -1), 33),
    "random": (lambda y: torch.sin(y) @ RANDOM.T, 50),
    "more unknowns than equations": (lambda y: torch.sin(y) @ WIDE.T, 60),
    "dense": (lambda y: y * y.sum(-1, keepdim=True), 5),
    "one dense column": (lambda y: y**2 + y[..., :1], 40),
    "one dense row": (lambda y: torch.cat([y.sum(-1, keepdim=True), y[..., 1:] ** 2], -1), 40),
    "one unknown": (lambda y: y**2, 1),
    "indexing": (lambda y: y[..., torch.arange(19, -1, -1)] * 2 + y, 20),
    "sums that cancel": (lambda y: torch.diff(y, prepend=y[..., -1:], dim=-1), 16),
    "cumulative": (lambda y: y.cumsum(-1), 12),
    "constant": (lambda y: torch.ones_like(y), 4),
}


def dense(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    flat = y.reshape(-1, y.shape[-1])
    return torch.stack([torch.autograd.functional.jacobian(f, row) for row in flat])


def start(n: int, *batch: int) -> Tensor:
    return torch.rand(*batch, n, generator=torch.Generator().manual_seed(3)) + 0.5


def linearized(f: Callable[..., Tensor], y: Tensor, *args: Tensor) -> Linearization:
    return linearize(System(f, Arguments.flatten(args), SystemShape.of(y, 1)), y, args)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_probing_finds_exactly_the_non_zeros(case: str, batch: tuple[int, ...]) -> None:
    f, n = CASES[case]
    y = start(n, *batch)
    assert torch.equal(detect_sparsity(f, y).dense(), (dense(f, y) != 0).any(0))


@pytest.mark.parametrize("case", ["stencil", "upwind, not symmetric", "dense", "indexing", "cumulative"])
def test_nan_finds_the_same_where_it_is_exact(case: str) -> None:
    f, n = CASES[case]
    assert detect_sparsity(f, start(n, 2), method="nan") == detect_sparsity(f, start(n, 2))


def test_what_each_method_gets_wrong_is_what_the_docstring_says() -> None:
    y = start(4)
    branch = lambda y: torch.where(y > 0, y, y.roll(1, -1))  # noqa: E731
    assert torch.equal(detect_sparsity(branch, y).dense(), torch.eye(4).bool())
    assert detect_sparsity(branch, y, method="nan").nnz == 0  # NaN > 0 is False: the other branch, elsewhere
    product = lambda y: y @ torch.eye(4)  # noqa: E731
    assert detect_sparsity(product, y).nnz == 4
    assert detect_sparsity(product, y, method="nan").nnz == 16  # 0 · NaN


def test_a_zero_by_accident_at_y_is_seen_beside_it() -> None:
    assert detect_sparsity(lambda y: y**2, torch.zeros(5)).nnz == 5


def test_the_union_over_samples_and_args() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pattern = detect_sparsity(lambda y, a: y * a, torch.ones(2, 2), (a,))
    assert torch.equal(pattern.dense(), torch.eye(2).bool())
    alone = detect_sparsity(lambda y, a: y * a, torch.ones(2), (a[0],))
    assert alone.nnz == 1


def test_event_dims() -> None:
    f = lambda y: y**2 + y.transpose(-1, -2)  # noqa: E731
    pattern = detect_sparsity(f, start(9, 2).reshape(2, 3, 3), event_dims=2)
    assert (pattern.shape, pattern.nnz) == ((9, 9), 15)


def test_a_stencil_takes_far_fewer_passes_than_unknowns(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    whole = torch.autograd.grad

    def counted(*args: object, **keywords: object) -> object:
        if keywords.get("is_grads_batched"):
            passes.append(len(args[2]))  # type: ignore[arg-type]
        return whole(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    n = 4096
    pattern = detect_sparsity(lambda y: y**2 + y.roll(1, -1) + y.roll(-1, -1), start(n))
    assert pattern.nnz == 3 * n
    assert sum(passes) < n / 10


def test_detection_refuses_what_it_cannot_do() -> None:
    with pytest.raises(inv.ConditionsError, match=r"detect_sparsity\(method='jvp'\): accepted are 'probe'"):
        detect_sparsity(lambda y: y, torch.ones(2), method="jvp")  # type: ignore[arg-type]
    with pytest.raises(inv.ConditionsError, match=r"f is NaN at y as it is"):
        detect_sparsity(lambda y: y / 0 * 0, torch.ones(2), method="nan")
    with pytest.raises(inv.ConditionsError, match=r"returned shape \(2,\)"):
        detect_sparsity(lambda y: y.sum(0), torch.ones(3, 2))


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_compressed_values_are_those_of_the_dense_jacobian(case: str, batch: tuple[int, ...]) -> None:
    f, n = CASES[case]
    y = start(n, *batch)
    exact, linearization = dense(f, y), linearized(f, y)
    for mask in ((exact != 0).any(0), torch.ones_like(exact[0]).bool()):  # as found, and all of it
        pattern = SparsityPattern.of(mask)
        values = compressed_values(linearization, pattern)
        torch.testing.assert_close(values, exact[:, pattern.rows, pattern.cols], rtol=1e-14, atol=1e-14)
        check_explains(linearization, pattern, values, "it")


def test_values_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invlayer_core.jacobians.blocks._CHUNK_BYTES", 3 * 50 * 8)
    f, n = CASES["random"]
    y = start(n)
    exact = dense(f, y)
    pattern = detect_sparsity(f, y)
    assert torch.equal(pattern.dense(), exact[0] != 0)
    values = compressed_values(linearized(f, y), pattern)
    torch.testing.assert_close(values, exact[:, pattern.rows, pattern.cols], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("missing", range(0, 12, 3))
def test_a_pattern_that_misses_one_entry_does_not_explain_a_pullback(missing: int) -> None:
    f, y = CASES["upwind, not symmetric"][0], start(6, 2)
    whole = detect_sparsity(f, y)
    kept = torch.arange(whole.nnz) != missing
    small = SparsityPattern(whole.rows[kept], whole.cols[kept], whole.shape)
    linearization = linearized(f, y)
    values = compressed_values(linearization, small)
    with pytest.raises(inv.ConditionsError, match=r"it misses entries of the Jacobian: in sample \d, column"):
        check_explains(linearization, small, values, "it")


def test_mixed_samples_are_called_by_their_name() -> None:
    y = start(5, 3)
    linearization = linearized(lambda y: y**2 - y.mean(0), y)
    pattern = SparsityPattern.of(torch.eye(5).bool())
    with pytest.raises(inv.ConditionsError, match=r"mix the samples of the batch \(3,\)"):
        check_explains(linearization, pattern, compressed_values(linearization, pattern), "it")


def test_nan_in_one_sample_stays_there() -> None:
    y = start(5, 3)
    pattern = SparsityPattern.of(torch.eye(5).bool())
    clean = compressed_values(linearized(lambda y: y**3, y), pattern)
    spoilt = linearized(lambda y: y**3, torch.where(torch.arange(3)[:, None] == 1, torch.nan, y))
    values = compressed_values(spoilt, pattern)
    check_explains(spoilt, pattern, values, "it")
    assert torch.equal(values[[0, 2]], clean[[0, 2]])
    assert values[1].isnan().all()
