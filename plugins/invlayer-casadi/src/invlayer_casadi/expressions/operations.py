"""CasADi's scalar operations in torch, with C's semantics for NaN, infinity and truth.

Each writes into ``out``, a row of the work tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import casadi as ca
import torch
from torch import Tensor

__all__ = ["BINARY", "UNARY", "Operation"]

Operation = Callable[..., Tensor]


def _written(compute: Callable[..., Tensor]) -> Operation:
    """An operation made of several torch calls, which has to be copied into its row."""

    def operation(*operands: Tensor, out: Tensor) -> Tensor:
        return out.copy_(compute(*operands))

    return operation


def _truth(condition: Tensor, like: Tensor) -> Tensor:
    return condition.to(like.dtype)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, torch.sign(x))


def _remainder(x: Tensor, y: Tensor) -> Tensor:
    """IEEE 754 remainder: x − n y with n the integer nearest to x / y, ties to even; exact, as fmod is."""
    size, divisor = x.abs(), y.abs()
    rest = torch.fmod(size, 2.0 * divisor)
    above = 2.0 * rest > divisor
    rest = torch.where(above, rest - divisor, rest)
    rest = torch.where(above & (2.0 * rest >= divisor), rest - divisor, rest)
    exact = torch.where(x < 0, -rest, rest)
    return torch.where(divisor.isinf() & x.isfinite(), x, exact)


UNARY: Final[dict[int, Operation]] = {
    ca.OP_ASSIGN: _written(lambda x: x),
    ca.OP_NEG: torch.neg,
    ca.OP_EXP: torch.exp,
    ca.OP_LOG: torch.log,
    ca.OP_SQRT: torch.sqrt,
    ca.OP_SQ: lambda x, out: torch.mul(x, x, out=out),
    ca.OP_TWICE: lambda x, out: torch.add(x, x, out=out),
    ca.OP_SIN: torch.sin,
    ca.OP_COS: torch.cos,
    ca.OP_TAN: torch.tan,
    ca.OP_ASIN: torch.asin,
    ca.OP_ACOS: torch.acos,
    ca.OP_ATAN: torch.atan,
    ca.OP_NOT: _written(lambda x: _truth(x == 0, x)),
    ca.OP_FLOOR: torch.floor,
    ca.OP_CEIL: torch.ceil,
    ca.OP_FABS: torch.abs,
    ca.OP_SIGN: _written(_sign),
    ca.OP_ERF: torch.erf,
    ca.OP_INV: torch.reciprocal,
    ca.OP_SINH: torch.sinh,
    ca.OP_COSH: torch.cosh,
    ca.OP_TANH: torch.tanh,
    ca.OP_ASINH: torch.asinh,
    ca.OP_ACOSH: torch.acosh,
    ca.OP_ATANH: torch.atanh,
    ca.OP_ERFINV: torch.erfinv,
    ca.OP_PRINTME: _written(lambda x: x),  # the value; nothing is printed
    ca.OP_LOG1P: torch.log1p,
    ca.OP_EXPM1: torch.expm1,
}
"""Operations of one argument, by opcode."""

BINARY: Final[dict[int, Operation]] = {
    ca.OP_ADD: torch.add,
    ca.OP_SUB: torch.sub,
    ca.OP_MUL: torch.mul,
    ca.OP_DIV: torch.div,
    ca.OP_POW: torch.pow,
    ca.OP_CONSTPOW: torch.pow,
    ca.OP_LT: _written(lambda x, y: _truth(x < y, x)),
    ca.OP_LE: _written(lambda x, y: _truth(x <= y, x)),
    ca.OP_EQ: _written(lambda x, y: _truth(x == y, x)),
    ca.OP_NE: _written(lambda x, y: _truth(x != y, x)),
    ca.OP_AND: _written(lambda x, y: _truth((x != 0) & (y != 0), x)),
    ca.OP_OR: _written(lambda x, y: _truth((x != 0) | (y != 0), x)),
    ca.OP_FMOD: torch.fmod,
    ca.OP_COPYSIGN: torch.copysign,
    ca.OP_IF_ELSE_ZERO: _written(lambda x, y: torch.where(x != 0, y, 0.0)),
    ca.OP_FMIN: torch.fmin,  # as in C, a number beats NaN
    ca.OP_FMAX: torch.fmax,
    ca.OP_ATAN2: torch.atan2,
    ca.OP_LIFT: _written(lambda x, _: x),
    ca.OP_HYPOT: torch.hypot,
    ca.OP_REMAINDER: _written(_remainder),
}
"""Operations of two arguments, by opcode; the arguments broadcast."""
