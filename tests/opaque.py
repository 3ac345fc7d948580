"""Shared problems: solvers that torch cannot see into, and Newton's method unrolled as an oracle.

The systems have three unknowns each: every equation holds two of them, and J is far from symmetric. F is
nonlinear in y and in the args; ``a`` is shared by the samples of a batch, ``b`` belongs to one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv

SIZE = 3
NEWTON_STEPS = 8  # one or two more than the values need: derivatives settle later


def gauss_jordan(blocks: Tensor, rhs: Tensor) -> Tensor:
    """Solve ``(*batch, n, n)`` systems by plain arithmetic (no pivoting): exact under every transform.

    ``torch.linalg`` cannot serve as an oracle there: see ``test_torch_itself.py``.
    """
    n = blocks.shape[-1]
    shape = torch.broadcast_shapes(blocks.shape[:-1], rhs.shape)
    rows = torch.cat([blocks.expand(*shape, n), rhs.expand(shape).unsqueeze(-1)], -1)
    for k in range(n):
        pivot_row = rows[..., k, :] / rows[..., k, k].unsqueeze(-1)
        unit = torch.eye(n, dtype=rows.dtype)[k]
        rows = rows - (rows[..., :, k] - unit).unsqueeze(-1) * pivot_row.unsqueeze(-2)
    return rows[..., -1]


def unrolled(
    conditions: Callable[..., Tensor], jacobian: Callable[..., Tensor], y: Tensor, *args: Tensor
) -> Tensor:
    """Newton's method from ``y``, every step recorded by torch: differentiable by brute force."""
    for _ in range(NEWTON_STEPS):
        y = y - gauss_jordan(jacobian(y, *args), conditions(y, *args))
    return y


def numpy_newton(
    residual: Callable[[np.ndarray], np.ndarray], jacobian: Callable[[np.ndarray], np.ndarray], y: np.ndarray
) -> np.ndarray:
    """Newton's method for a batch ``(*batch, n)`` in NumPy."""
    for _ in range(40):
        step = np.linalg.solve(jacobian(y), residual(y)[..., None])[..., 0]
        y = y - step
        if np.all(np.abs(step) <= 1e-15 * np.abs(y)):
            break
    return y


def root_conditions(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return y + 0.3 * a * torch.sin(y.roll(1, -1)) + b * y**3 - b


def root_jacobian(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _jacobian(1 + 3 * b * y**2, 0.3 * a * torch.cos(y.roll(1, -1)))


def fixed_point_map(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.3 * a * torch.sin(y.roll(1, -1)) + 0.2 * b * torch.tanh(y) + b**2


def fixed_point_conditions(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return fixed_point_map(y, a, b) - y


def fixed_point_jacobian(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _jacobian(0.2 * b * (1 - torch.tanh(y) ** 2) - 1, 0.3 * a * torch.cos(y.roll(1, -1)))


def forward_map(y: Tensor) -> Tensor:
    """The f whose inverse is sought."""
    return y + 0.3 * torch.sin(y.roll(1, -1)) + y**3


def forward_jacobian(y: Tensor) -> Tensor:
    return _jacobian(1 + 3 * y**2, 0.3 * torch.cos(y.roll(1, -1)))


def _jacobian(diagonal: Tensor, off: Tensor) -> Tensor:
    """Blocks from ∂F_i/∂y_i and ∂F_i/∂y_{i-1}, each ``(*batch, n)``."""
    shift = torch.eye(SIZE, dtype=off.dtype).roll(1, 0)
    return torch.diag_embed(diagonal) + off.unsqueeze(-1) * shift


def _solve_opaquely(
    conditions: Callable[..., Tensor], jacobian: Callable[..., Tensor], *args: Tensor
) -> Tensor:
    """Through NumPy: no gradient survives, and ``.numpy()`` raises on a tensor that torch has wrapped."""
    arrays = [np.array(arg.detach().numpy()) for arg in args]
    start = np.zeros(np.broadcast_shapes(*(array.shape for array in arrays)))

    def evaluate(function: Callable[..., Tensor], y: np.ndarray) -> np.ndarray:
        return function(torch.from_numpy(y), *map(torch.from_numpy, arrays)).numpy()

    with torch.no_grad():
        y = numpy_newton(lambda y: evaluate(conditions, y), lambda y: evaluate(jacobian, y), start)
    return torch.from_numpy(y)


def opaque_root(_y0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _solve_opaquely(root_conditions, root_jacobian, a, b)


def opaque_fixed_point(_y0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _solve_opaquely(fixed_point_conditions, fixed_point_jacobian, a, b)


def opaque_inverse(x: Tensor) -> Tensor:
    return _solve_opaquely(lambda y, x: forward_map(y) - x, lambda y, x: forward_jacobian(y), x)


def start_like(b: Tensor) -> Tensor:
    return torch.zeros_like(b).detach()


@dataclass(frozen=True)
class Case:
    """A layer, the same function by brute force, and which of its args are one per sample."""

    layer: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    shared: tuple[bool, ...]

    def inputs(self, *batch: int) -> tuple[Tensor, ...]:
        """Args for one sample, or for a batch."""
        generator = torch.Generator().manual_seed(1)
        return tuple(
            0.5 + torch.rand(*(() if shared else batch), SIZE, generator=generator, dtype=torch.float64)
            for shared in self.shared
        )


def _root_oracle(a: Tensor, b: Tensor) -> Tensor:
    return unrolled(root_conditions, root_jacobian, start_like(b), a, b)


def _fixed_point_oracle(a: Tensor, b: Tensor) -> Tensor:
    return unrolled(fixed_point_conditions, fixed_point_jacobian, start_like(b), a, b)


def _inverse_oracle(x: Tensor) -> Tensor:
    return unrolled(lambda y, x: forward_map(y) - x, lambda y, x: forward_jacobian(y), start_like(x), x)


def _root(solver: object) -> Callable[..., Tensor]:
    return lambda a, b: inv.root(root_conditions, start_like(b), args=(a, b), solver=solver)


def _fixed_point(solver: object) -> Callable[..., Tensor]:
    return lambda a, b: inv.fixed_point(fixed_point_map, start_like(b), args=(a, b), solver=solver)


def _inverse(g: Callable[[Tensor], Tensor], **known: object) -> Callable[..., Tensor]:
    return lambda x: inv.inverse(x, g, **(known or {"f": forward_map}))


def _implicit(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return inv.implicit_function(conditions=root_conditions)(solve)


CASES = {
    "root-native": Case(_root("torch.newton"), _root_oracle, (True, False)),
    "root-opaque": Case(_root(opaque_root), _root_oracle, (True, False)),
    "fixed_point-native": Case(_fixed_point("torch.newton"), _fixed_point_oracle, (True, False)),
    "fixed_point-opaque": Case(_fixed_point(opaque_fixed_point), _fixed_point_oracle, (True, False)),
    "inverse-native": Case(_inverse(_inverse_oracle), _inverse_oracle, (False,)),
    "inverse-opaque": Case(_inverse(opaque_inverse), _inverse_oracle, (False,)),
    "inverse-jacobian": Case(_inverse(opaque_inverse, jacobian=forward_jacobian), _inverse_oracle, (False,)),
    "implicit_function-native": Case(_implicit(_root_oracle), _root_oracle, (True, False)),
    "implicit_function-opaque": Case(
        _implicit(lambda a, b: opaque_root(b, a, b)), _root_oracle, (True, False)
    ),
}
"""Every problem kind, with a solver written in torch and with one that torch cannot see into."""
