"""A CasADi Function as a torch program: its scalar instructions, grouped so that each group is one call.

CasADi keeps an SX Function as a list of scalar instructions on a work vector. Here every value gets a row of
its own (static single assignment), and instructions that wait for nothing but earlier rows form a *level*
(as list scheduling has it). All instructions of one opcode in one level are one torch call on gathered rows:
200 000 instructions of an optimal-control problem make 249 calls.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from threading import Lock
from typing import Final, final

import casadi as ca
import numpy as np

from invlayer_casadi.expressions.operations import BINARY, UNARY

__all__ = ["Group", "Program", "UntranslatableError", "program_of"]


@final
class UntranslatableError(Exception):
    """The Function has no form in scalar instructions; the message says why."""


@final
@dataclass(frozen=True)
class Group:
    """Independent instructions of one opcode; their results are the rows from ``start`` on.

    Attributes
    ----------
    opcode : int
    start, count : int
    operands : tuple of ndarray of int
        For each argument of the operation, its rows.
    """

    opcode: int
    start: int
    count: int
    operands: tuple[np.ndarray, ...]


@final
@dataclass(frozen=True)
class Program:
    """Rows: first the constants, then the nonzeros of all inputs, then the groups' results.

    Attributes
    ----------
    constants : ndarray of float64
    inputs, outputs : tuple of int
        Numbers of nonzeros of each.
    groups : tuple of Group
    results : ndarray of int
        The rows of the nonzeros of all outputs, one output after the other.
    rows : int
        How many rows there are.
    """

    constants: np.ndarray
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: tuple[Group, ...]
    results: np.ndarray
    rows: int


def program_of(function: ca.Function) -> Program:
    """The program of a Function; translated once for each content.

    Raises
    ------
    UntranslatableError
        If it, or a Function it calls, is more than scalar operations.
    """
    try:
        key = sha256(function.serialize().encode()).digest()
    except RuntimeError as error:  # a Callback
        raise UntranslatableError(f"it cannot be serialised ({_first_line(error)})") from error
    return _CACHE.get(key, function)


@final
class _ProgramCache:
    """The programs used last, by content."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._programs: OrderedDict[bytes, Program | UntranslatableError] = OrderedDict()

    def get(self, key: bytes, function: ca.Function) -> Program:
        with self._lock:
            found = self._programs.get(key)
        if found is None:
            try:
                found = _translate(_expanded(function))
            except UntranslatableError as error:
                found = error
            with self._lock:
                self._programs[key] = found
                while len(self._programs) > self._most:
                    self._programs.popitem(last=False)
        if isinstance(found, UntranslatableError):
            raise UntranslatableError(str(found))
        return found


_CACHE: Final = _ProgramCache(128)


def _expanded(function: ca.Function) -> ca.Function:
    if function.is_a("SXFunction"):
        return function
    try:
        return function.expand()
    except RuntimeError as error:
        raise UntranslatableError(
            f"CasADi cannot expand it into scalar operations ({_first_line(error)})"
        ) from error


def _translate(function: ca.Function) -> Program:
    if not function.is_a("SXFunction"):
        raise UntranslatableError(f"it is a {function.class_name()}")
    walk = _Walk(function)
    order = _schedule(walk)
    return _grouped(walk, *order)


@final
class _Walk:
    """The instructions in static single assignment: node numbers instead of places in the work vector."""

    def __init__(self, function: ca.Function) -> None:
        self.inputs = tuple(function.nnz_in(i) for i in range(function.n_in()))
        self.outputs = tuple(function.nnz_out(i) for i in range(function.n_out()))
        self.constants: dict[bytes, int] = {}  # by bit pattern: -0.0 and 0.0 differ, NaN equals itself
        self.opcodes: list[int] = []
        self.operands: list[tuple[int, ...]] = []
        self.results = [-1] * sum(self.outputs)
        self._into = np.concatenate([[0], np.cumsum(self.inputs)]).tolist()
        self._out = np.concatenate([[0], np.cumsum(self.outputs)]).tolist()
        self._walk(function)

    # Nodes: constants are −1, −2, ...; inputs 0, 1, ...; operations after them.

    def _walk(self, function: ca.Function) -> None:
        work: dict[int, int] = {}
        first = self._into[-1]
        zero = self._constant(0.0)
        for k in range(function.n_instructions()):
            opcode = function.instruction_id(k)
            if opcode == ca.OP_INPUT:
                source, place = function.instruction_input(k)
                work[function.instruction_output(k)[0]] = self._into[source] + place
            elif opcode == ca.OP_OUTPUT:
                target, place = function.instruction_output(k)
                self.results[self._out[target] + place] = work.get(function.instruction_input(k)[0], zero)
            elif opcode == ca.OP_CONST:
                work[function.instruction_output(k)[0]] = self._constant(function.instruction_constant(k))
            else:
                arity = 1 if opcode in UNARY else 2 if opcode in BINARY else 0
                if not arity:
                    raise UntranslatableError(_unknown(opcode))
                places = function.instruction_input(k)
                self.operands.append(tuple(work[place] for place in places[:arity]))
                self.opcodes.append(opcode)
                work[function.instruction_output(k)[0]] = first + len(self.opcodes) - 1

    def _constant(self, value: float) -> int:
        return -1 - self.constants.setdefault(np.float64(value).tobytes(), len(self.constants))


def _unknown(opcode: int) -> str:
    if opcode == ca.OP_CALL:
        return (
            "it calls another Function that is no expression: an interpolant, Callback, solver or integrator"
        )
    return f"it holds an operation with opcode {opcode}, which has no translation"


def _schedule(walk: _Walk) -> tuple[np.ndarray, np.ndarray]:
    """The level of every operation, and the order by (level, opcode, which operands are constants)."""
    first = sum(walk.inputs)
    level = [0] * (first + len(walk.opcodes))
    for node, operands in enumerate(walk.operands, first):
        level[node] = 1 + max(level[o] if o >= 0 else 0 for o in operands)
    levels = np.asarray(level[first:], dtype=np.int64)
    kinds = np.asarray([sum(1 << i for i, o in enumerate(each) if o < 0) for each in walk.operands], np.int64)
    keys = (levels * 256 + np.asarray(walk.opcodes, np.int64)) * 4 + kinds
    return keys, np.argsort(keys, kind="stable")


def _grouped(walk: _Walk, keys: np.ndarray, order: np.ndarray) -> Program:
    constants = np.frombuffer(b"".join(walk.constants), dtype=np.float64).copy()
    lead, first = len(constants), sum(walk.inputs)
    row = np.empty(first + len(order), dtype=np.int64)  # node -> row
    row[:first] = lead + np.arange(first)
    row[first + order] = lead + first + np.arange(len(order))

    def rows(nodes: list[int]) -> np.ndarray:
        array = np.asarray(nodes, dtype=np.int64)
        return np.where(array < 0, -1 - array, row[np.maximum(array, 0)] if len(row) else 0)

    bounds = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1))
    groups = []
    for begin, end in pairwise(bounds):
        members = order[begin:end].tolist()
        columns = zip(*(walk.operands[m] for m in members), strict=True)
        operands = tuple(rows(list(column)) for column in columns)
        groups.append(Group(walk.opcodes[members[0]], lead + first + int(begin), int(end - begin), operands))
    return Program(
        constants, walk.inputs, walk.outputs, tuple(groups), rows(walk.results), lead + first + len(order)
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
