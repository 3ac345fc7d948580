"""Sparsity patterns from user input, and their colourings."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core.jacobians import SparsityPattern

MASK = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).bool()
ROWS, COLS = MASK.nonzero(as_tuple=True)


def weird_order() -> tuple[Tensor, Tensor]:
    """The entries shuffled, and two of them twice."""
    order = torch.tensor([3, 0, 4, 1, 2, 0, 3])
    return ROWS[order], COLS[order]


SOURCES = {
    "bool": lambda: MASK,
    "coo": lambda: MASK.double().to_sparse_coo(),
    "coo, uncoalesced": lambda: torch.sparse_coo_tensor(
        torch.stack(weird_order()), torch.ones(7), (4, 3), check_invariants=True
    ),
    "coo, bool": lambda: MASK.to_sparse_coo(),
    "coo, explicit zeros": lambda: torch.sparse_coo_tensor(
        MASK.nonzero().T, torch.zeros(5), (4, 3), check_invariants=True
    ),
    "csr": lambda: MASK.double().to_sparse_csr(),
    "csc": lambda: MASK.double().to_sparse_csc(),
    "pattern": lambda: SparsityPattern(ROWS, COLS, (4, 3)),
}


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta:UserWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_every_form_of_input_gives_the_same_pattern(source: str) -> None:
    pattern = SparsityPattern.of(SOURCES[source]())
    assert torch.equal(pattern.dense(), MASK)
    assert pattern == SparsityPattern(*weird_order(), (4, 3))
    assert hash(pattern) == hash(SparsityPattern(*weird_order(), (4, 3)))
    assert (pattern.nnz, pattern.shape) == (5, (4, 3))


def test_a_pair_of_index_tensors_needs_a_shape() -> None:
    assert torch.equal(SparsityPattern.of((ROWS, COLS), shape=(4, 3)).dense(), MASK)
    assert torch.equal(SparsityPattern.of(([0], [1]), shape=(1, 2)).dense(), torch.tensor([[False, True]]))
    with pytest.raises(
        inv.ConditionsError, match=r"SparsityPattern\.of\(a tuple, shape=None\).*index tensors"
    ):
        SparsityPattern.of((ROWS, COLS))


def test_entries_are_in_csc_order() -> None:
    pattern = SparsityPattern(*weird_order(), (4, 3))
    csc = MASK.T.nonzero()
    assert torch.equal(pattern.cols, csc[:, 0])
    assert torch.equal(pattern.rows, csc[:, 1])
    assert pattern.column_pointers.tolist() == [0, 2, 4, 5]


def test_patterns_differ_by_entries_and_by_shape() -> None:
    pattern = SparsityPattern(ROWS, COLS, (4, 3))
    assert pattern != SparsityPattern(ROWS, COLS, (5, 3))
    assert pattern != SparsityPattern(ROWS[1:], COLS[1:], (4, 3))
    assert pattern != SparsityPattern(ROWS.flip(0), COLS, (4, 3))
    assert pattern != "pattern"
    assert {pattern: 1}[SparsityPattern(*weird_order(), (4, 3))] == 1


def test_a_pattern_can_be_copied_and_pickled_with_what_it_has_worked_out() -> None:
    pattern = SparsityPattern(ROWS, COLS, (4, 3))
    assert pattern.row_colouring.number == 2
    for twin in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert twin == pattern
        assert torch.equal(twin.row_colouring.colours, pattern.row_colouring.colours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([0, 4]), torch.tensor([0, 0]), (4, 3)), r"rows holds indices from 0 to 4; .*0 to 3"),
        ((torch.tensor([0]), torch.tensor([-1]), (4, 3)), r"cols holds indices from -1 to -1; .*0 to 2"),
        ((torch.tensor([0, 1]), torch.tensor([0]), (4, 3)), r"rows has 2 entries and cols 1"),
        ((torch.tensor([0.0]), torch.tensor([0]), (4, 3)), r"rows is .*float.*vector of integer"),
        ((torch.tensor([[0]]), torch.tensor([0]), (4, 3)), r"rows is .*\(1, 1\).*vector of integer"),
        ((torch.tensor([True]), torch.tensor([0]), (4, 3)), r"rows is .*bool.*vector of integer"),
        (([0], [0], (4, 3)), r"rows is a list; accepted is a vector of integer"),
        ((torch.tensor([0]), torch.tensor([0]), 4), r"shape=4; accepted is \(m, n\)"),
        ((torch.tensor([0]), torch.tensor([0]), (4, -3)), r"shape=\(4, -3\); accepted"),
        ((torch.tensor([0]), torch.tensor([0]), (4, True)), r"shape=\(4, True\); accepted"),
    ],
)
def test_indices_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        SparsityPattern(*arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.eye(3), r"strided tensor of shape \(3, 3\) and dtype torch.float32.*write matrix != 0"),
        (torch.ones(2, 3, 3, dtype=torch.bool), r"one system's pattern \(m, n\)"),
        (torch.ones(3).to_sparse_coo(), r"one system's pattern \(m, n\)"),
        ("eye", r"SparsityPattern\.of\(a str, shape=None\)"),
    ],
)
def test_other_input_is_refused(source: object, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        SparsityPattern.of(source)


def masks() -> list[Tensor]:
    torch.manual_seed(0)
    random = [torch.rand(m, n) < p for m, n in [(1, 1), (7, 9), (40, 25)] for p in (0.05, 0.3, 1.0)]
    i = torch.arange(30)
    band = (i - i.unsqueeze(-1)).abs() <= 2
    arrow = (i == 0) | (i.unsqueeze(-1) == 0) | (i == i.unsqueeze(-1))
    return [*random, band, arrow, torch.zeros(4, 3, dtype=torch.bool), torch.zeros(0, 0, dtype=torch.bool)]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{tuple(mask.shape)}-{int(mask.sum())}")
def test_no_two_of_one_colour_share_an_unknown(mask: Tensor) -> None:
    pattern = SparsityPattern.of(mask)
    for grid, colouring in ((mask, pattern.row_colouring), (mask.T, pattern.column_colouring)):
        assert colouring.colours.shape == grid.shape[:1]
        for colour in range(colouring.number):
            members = grid[colouring.colours == colour]
            assert len(members) > 0, "a colour without members"
            assert int(members.sum(0).max()) <= 1 if members.shape[1] else True


def test_colours_are_as_few_as_greedy_makes_them() -> None:
    i = torch.arange(1000)
    tridiagonal = SparsityPattern(torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]]), (1000, 1000))
    assert tridiagonal.row_colouring.number == 3
    assert tridiagonal.is_symmetric
    dense_column = SparsityPattern(torch.cat([i, i]), torch.cat([i, 0 * i]), (1000, 1000))
    assert (dense_column.row_colouring.number, dense_column.column_colouring.number) == (1000, 2)
    assert not dense_column.is_symmetric
