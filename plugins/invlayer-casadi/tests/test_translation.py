"""The torch translation of CasADi's instructions against CasADi itself: every opcode, random graphs."""

import itertools
import math
import random

import casadi as ca
import numpy as np
import pytest
import torch
from torch import Tensor

from invlayer_casadi import CasadiFunction
from invlayer_casadi.expressions.execution import LevelwiseExecution, LinewiseExecution, run_program
from invlayer_casadi.expressions.operations import BINARY, UNARY
from invlayer_casadi.expressions.program import program_of

F64 = torch.float64
NAMES = {
    getattr(ca, name): name
    for name in dir(ca)
    if name.startswith("OP_") and (getattr(ca, name) <= ca.OP_CONST or getattr(ca, name) in UNARY | BINARY)
}
SPECIAL = [-math.inf, -2.5, -2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 7.0, math.inf, math.nan]


def of_opcode(opcode: int) -> ca.Function:
    """A Function that consists of one operation, whatever CasADi's simplifications."""
    x, y = ca.SX.sym("x"), ca.SX.sym("y")
    if opcode == ca.OP_CONST:
        return ca.Function("f", [x, y], [ca.SX(3.25)])
    if opcode == ca.OP_CONSTPOW:
        return ca.Function("f", [x, y], [ca.constpow(x, y)])
    result = ca.SX.unary(opcode, x) if opcode in UNARY else ca.SX.binary(opcode, x, y)
    return ca.Function("f", [x, y], [result])


def by_casadi(function: ca.Function, *inputs: Tensor) -> list[Tensor]:
    rows = [function.call([ca.DM(row.numpy()) for row in rows]) for rows in zip(*inputs, strict=True)]
    return [
        torch.tensor(np.array([np.array(row[i]).reshape(-1) for row in rows])) for i in range(len(rows[0]))
    ]


def by_both_executions(function: ca.Function, *inputs: Tensor) -> list[list[Tensor]]:
    program = program_of(function)
    return [run_program(kind(program, inputs[0]), inputs) for kind in (LevelwiseExecution, LinewiseExecution)]


def test_there_are_52_scalar_opcodes_and_all_are_translated() -> None:
    assert len(NAMES) == 52
    assert set(NAMES) == set(UNARY) | set(BINARY) | {ca.OP_CONST}


@pytest.mark.parametrize("opcode", NAMES, ids=NAMES.get)
def test_every_opcode_on_every_kind_of_number(opcode: int) -> None:
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=F64)
    if opcode == ca.OP_PRINTME:  # would print 225 lines
        pairs = pairs[:3]
    function = of_opcode(opcode)
    held = {function.instruction_id(k) for k in range(function.n_instructions())}
    assert opcode in held | {ca.OP_ASSIGN, ca.OP_LIFT, ca.OP_CONSTPOW}  # simplified, for two symbols
    x, y = pairs[:, :1].contiguous(), pairs[:, 1:].contiguous()
    (expected,) = by_casadi(function, x, y)
    # CasADi's own erfinv is accurate to 1e-7 only
    tolerance = {"rtol": 2e-7, "atol": 1e-12} if opcode == ca.OP_ERFINV else {"rtol": 4e-16, "atol": 0}
    for (ours,) in by_both_executions(function, x, y):
        torch.testing.assert_close(ours, expected, equal_nan=True, **tolerance)


def random_graph(seed: int, operations: int = 40) -> ca.Function:
    """A graph of any operations on inputs and constants, bounded so that values stay moderate."""
    generator = random.Random(seed)
    x, p = ca.SX.sym("x", 4), ca.SX.sym("p", 3)
    nodes = [*ca.vertsplit(x), *ca.vertsplit(p), ca.SX(0.75), ca.SX(-1.5)]
    opcodes = sorted((UNARY | BINARY).keys() - {ca.OP_PRINTME, ca.OP_ERFINV})
    for _ in range(operations):
        opcode = generator.choice(opcodes)
        a, b = generator.choice(nodes), generator.choice(nodes)
        if opcode == ca.OP_COPYSIGN:  # the sign bit of NaN, which C leaves open, is the one known difference
            b = generator.choice(nodes[:9])
        node = ca.SX.unary(opcode, a) if opcode in UNARY else ca.SX.binary(opcode, a, b)
        nodes.append(ca.sin(node) if generator.random() < 0.3 else node)
    matrix = ca.SX(3, 2)
    matrix[0, 0], matrix[2, 1] = nodes[-1], nodes[-2]
    return ca.Function("graph", [x, p], [ca.vertcat(*nodes[-4:]), matrix])


def check_graph(seed: int) -> None:
    function = random_graph(seed)
    generator = torch.Generator().manual_seed(seed)
    x, p = (torch.randn(7, n, generator=generator, dtype=F64) for n in (4, 3))
    for derived in (function, function.reverse(1), function.forward(1)):
        inputs = [x, p] + [
            torch.randn(7, derived.nnz_in(i), generator=generator, dtype=F64)
            for i in range(2, derived.n_in())
        ]
        buffers = [torch.zeros(7, derived.nnz_out(i), dtype=F64) for i in range(derived.n_out())]
        call, trigger = derived.map(7).buffer()
        for i, tensor in enumerate(inputs):
            if tensor.numel():
                call.set_arg(i, memoryview(tensor.numpy().reshape(-1)))
        for i, tensor in enumerate(buffers):
            if tensor.numel():
                call.set_res(i, memoryview(tensor.numpy().reshape(-1)))
        trigger()
        for results in by_both_executions(derived, *inputs):
            for ours, expected in zip(results, buffers, strict=True):
                # rounding grows with what a graph magnifies; a wrong operation is off by far more
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("block", range(10))
def test_random_graphs_and_their_derivatives(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        check_graph(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10, 100))
def test_a_thousand_random_graphs(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        check_graph(seed)


@pytest.mark.parametrize("backend", ["casadi", "torch"])
def test_the_branch_not_taken_gives_zero_and_not_nan(backend: str) -> None:
    x = ca.SX.sym("x")
    f = CasadiFunction(ca.Function("f", [x], [ca.if_else(x > 0, ca.sqrt(x), 0)]), backend=backend)
    t = torch.tensor([[-1.0], [0.0], [4.0]], dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(f(t).sum(), t, create_graph=True)
    torch.testing.assert_close(first, torch.tensor([[0.0], [0.0], [0.25]], dtype=F64), rtol=0, atol=0)
    (second,) = torch.autograd.grad(first.sum(), t)
    torch.testing.assert_close(second, torch.tensor([[0.0], [0.0], [-1 / 32]], dtype=F64), rtol=1e-15, atol=0)
    u = t.detach().requires_grad_()
    tape = torch.where(u > 0, torch.sqrt(u), 0.0)
    assert torch.autograd.grad(tape.sum(), u)[0][:2].isnan().any()  # what a tape would have given


@pytest.mark.parametrize("backend", ["casadi", "torch"])
def test_ties_follow_casadi(backend: str) -> None:
    x, y = ca.SX.sym("x"), ca.SX.sym("y")
    f = CasadiFunction(ca.Function("f", [x, y], [ca.fmin(x, y)]), backend=backend)
    t, u = (torch.tensor([[2.0]], dtype=F64, requires_grad=True) for _ in range(2))
    assert [float(g) for g in torch.autograd.grad(f(t, u).sum(), (t, u))] == [0.5, 0.5]


def test_translations_are_shared_by_content() -> None:
    twins = [random_graph(3), random_graph(3)]
    assert program_of(twins[0]) is program_of(twins[1])
    assert program_of(random_graph(4)) is not program_of(twins[0])


def test_a_long_program_is_a_few_groups() -> None:
    x = ca.SX.sym("x", 500)
    program = program_of(ca.Function("f", [x], [ca.sin(x) * ca.cos(x) + x**2]))
    assert program.rows > 2000
    assert len(program.groups) <= 6
