"""Two ways to run a :class:`Program` on a batch, ``(rows, B)`` at a time.

*Level by level*: one torch call per group, for few samples of a long program, and on a GPU, where each call
costs more than what it computes. *Line by line*: one call per instruction, on a few rows that are used again
as soon as their value is spent, so that they stay in the cache: for many samples on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple, final

import casadi as ca
import numpy as np
import torch
from torch import Tensor

from invlayer_casadi.expressions.operations import BINARY, UNARY, Operation
from invlayer_casadi.expressions.program import Group, Program

__all__ = ["LevelwiseExecution", "LinewiseExecution", "linewise_pays", "run_program"]

_LINEWISE_FROM: Final = 512  # samples
_WORK_BYTES: Final = {"levels": 1 << 28, "lines": 1 << 24}


_ADD_PRODUCT: Final[Operation] = torch.addcmul
_SUBTRACT_PRODUCT: Final[Operation] = partial(torch.addcmul, value=-1)


def _operation(opcode: int) -> Operation:
    return UNARY[opcode] if opcode in UNARY else BINARY[opcode]


@final
class _Operand:
    """Where a group finds one of its arguments: constants, adjacent rows, one row for all, or any rows."""

    def __init__(self, rows: np.ndarray, program: Program, like: Tensor, *, shared: bool) -> None:
        self.constant = self.index = None
        self.start, self.count = int(rows[0]), len(rows)
        if self.start < len(program.constants):
            self.constant = torch.as_tensor(program.constants[rows], dtype=like.dtype).to(like.device)[
                :, None
            ]
        elif shared and (rows == rows[0]).all():
            self.count = 1
        elif (np.diff(rows) != 1).any():
            self.index = torch.as_tensor(rows, device=like.device)

    def of(self, work: Tensor) -> Tensor:
        if self.constant is not None:
            return self.constant
        if self.index is not None:
            return work.index_select(0, self.index)
        return work.narrow(0, self.start, self.count)


@final
class LevelwiseExecution:
    """One torch call per group, all rows kept; for one device and dtype."""

    def __init__(self, program: Program, like: Tensor) -> None:
        self.program = program
        self._lead = torch.as_tensor(program.constants, dtype=like.dtype).to(like.device)[:, None]
        self._steps = [
            (_operation(g.opcode), g.start, g.count, self._operands(g, like)) for g in program.groups
        ]
        self._results = torch.as_tensor(program.results, device=like.device)

    def _operands(self, group: Group, like: Tensor) -> tuple[_Operand, ...]:
        lead = len(self.program.constants)
        varied = [rows[0] >= lead and (rows != rows[0]).any() for rows in group.operands]
        return tuple(
            _Operand(rows, self.program, like, shared=any(v for j, v in enumerate(varied) if j != i))
            for i, rows in enumerate(group.operands)
        )

    @property
    def most(self) -> int:
        """How many samples fit into the memory that one run may take."""
        return max(1, _WORK_BYTES["levels"] // (8 * max(1, self.program.rows)))

    def __call__(self, inputs: Tensor) -> Tensor:
        """``(nonzeros in, B) -> (nonzeros out, B)``."""
        lead = len(self.program.constants)
        work = inputs.new_empty(self.program.rows, inputs.shape[1])
        work[:lead] = self._lead
        work[lead : lead + len(inputs)] = inputs
        for operation, start, count, operands in self._steps:
            operation(*(operand.of(work) for operand in operands), out=work.narrow(0, start, count))
        return work.index_select(0, self._results)


@final
class LinewiseExecution:
    """One torch call per instruction, rows reused by linear scan (Poletto & Sarkar 1999)."""

    def __init__(self, program: Program, like: Tensor) -> None:
        self.program = program
        self._lead, self._nonzeros = len(program.constants), sum(program.inputs)
        self._constants = torch.as_tensor(program.constants, dtype=like.dtype).to(like.device).unbind(0)
        self._steps, self._places, self.registers = self._allocate()

    def _allocate(self) -> tuple[list[tuple[Operation, int, int, int, int]], list[int], int]:
        """Every row as a place: constants, then inputs, then registers."""
        first = self._lead + self._nonzeros
        lines = _fused(self.program)
        last = {row: t for t, line in enumerate(lines) for row in line.operands}
        last.update((int(row), len(lines)) for row in self.program.results)
        place: dict[int, int] = {row: row for row in range(first)}
        free: list[int] = []
        used, steps = first, []
        for t, line in enumerate(lines):
            sources = [place[o] for o in line.operands]
            # An operand that is read for the last time gives its place to the result: all is elementwise.
            free += [place[o] for o in set(line.operands) if o >= first and last[o] == t]
            if not free:
                free, used = [used], used + 1
            place[line.row] = free.pop()
            sources += [-1] * (3 - len(sources))
            steps.append((line.operation, place[line.row], sources[0], sources[1], sources[2]))
        return steps, [place[int(row)] for row in self.program.results], used - first

    @property
    def most(self) -> int:
        """How many samples keep the registers in the cache."""
        return max(4096, _WORK_BYTES["lines"] // (8 * max(1, self.registers)))

    def __call__(self, inputs: Tensor) -> Tensor:
        registers = inputs.new_empty(self.registers, inputs.shape[1])
        rows = (*self._constants, *inputs.unbind(0), *registers.unbind(0))
        for operation, target, first, second, third in self._steps:
            if second < 0:
                operation(rows[first], out=rows[target])
            elif third < 0:
                operation(rows[first], rows[second], out=rows[target])
            else:
                operation(rows[first], rows[second], rows[third], out=rows[target])
        results = inputs.new_empty(len(self._places), inputs.shape[1])
        for row, place in zip(results.unbind(0), self._places, strict=True):
            row.copy_(rows[place])
        return results


@final
class _Line(NamedTuple):
    """One torch call of the line-by-line execution."""

    operation: Operation
    row: int
    operands: tuple[int, ...]


def _fused(program: Program) -> list[_Line]:
    """The instructions one by one; x ± a b, where nothing else reads the product, is one call."""
    lines = {
        group.start + k: (group.opcode, tuple(int(rows[k]) for rows in group.operands))
        for group in program.groups
        for k in range(group.count)
    }
    uses = Counter(row for _, operands in lines.values() for row in operands)
    uses.update(int(row) for row in program.results)
    product = {
        row: operands * 2 if opcode == ca.OP_SQ else operands
        for row, (opcode, operands) in lines.items()
        if opcode in (ca.OP_MUL, ca.OP_SQ) and uses[row] == 1
    }
    fused: dict[int, _Line] = {}
    for row, (opcode, operands) in lines.items():
        if opcode == ca.OP_ADD and operands[0] in product and operands[1] not in product:
            operands = operands[::-1]
        if opcode in (ca.OP_ADD, ca.OP_SUB) and operands[1] in product:
            factors = product[operands[1]]
            fused[operands[1]] = fused[operands[1]]._replace(operands=())  # marked: no call of its own
            operation = _ADD_PRODUCT if opcode == ca.OP_ADD else _SUBTRACT_PRODUCT
            fused[row] = _Line(operation, row, (operands[0], *factors))
        else:
            fused[row] = _Line(_operation(opcode), row, operands)
    return [line for line in fused.values() if line.operands]


def run_program(execution: LevelwiseExecution | LinewiseExecution, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``(B, nonzeros)`` of every input to ``(B, nonzeros)`` of every output, in parts that fit."""
    batch, most = inputs[0].shape[0], execution.most
    joined = inputs[0].new_empty(sum(execution.program.inputs), batch)
    for rows, tensor in zip(joined.split(list(execution.program.inputs)), inputs, strict=True):
        rows.copy_(tensor.T)
    if batch <= most:
        results = execution(joined)
    else:
        results = torch.cat([execution(part.contiguous()) for part in joined.split(most, dim=1)], dim=1)
    # Forward mode wants strides as a new tensor has them, which contiguous() does not promise.
    parts = results.split(list(execution.program.outputs))
    return [rows.new_empty(batch, rows.shape[0]).copy_(rows.T) for rows in parts]


def linewise_pays(inputs: Sequence[Tensor]) -> bool:
    """Whether there are so many samples, on a CPU, that the calls themselves do not matter."""
    return inputs[0].device.type == "cpu" and inputs[0].shape[0] >= _LINEWISE_FROM
