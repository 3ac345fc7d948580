"""One problem in pytrees, one in complex numbers; each solved by Newton's method unrolled in torch, too.

A sample's unknowns are a pose p ``(3,)`` and a gain g ``()``; ``a`` ``(3,)`` is shared by the samples of a
batch, ``b`` ``(3,)`` belongs to one of them. The complex problem is the power flow of two load buses fed by
a slack bus: v_i conj(i_i) = s_i with i = Y v + y₀ v₀, which is not holomorphic in v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.opaque import gauss_jordan
from torch import Tensor

NEWTON_STEPS = 9


class State(NamedTuple):
    pose: Tensor
    gain: Tensor


# How the same two tensors are arranged: the guess for a batch, its event_dims, and the way to the leaves.
ARRANGEMENTS: dict[
    str, tuple[Callable[[Tensor, Tensor], Any], Any, Callable[[Any], tuple[Tensor, Tensor]]]
] = {
    "dict": (lambda p, g: {"pose": p, "gain": g}, {"pose": 1, "gain": 0}, lambda y: (y["pose"], y["gain"])),
    "tuple": (lambda p, g: (p, g), (1, 0), lambda y: y),
    "list": (lambda p, g: [g, p], [0, 1], lambda y: (y[1], y[0])),
    "named tuple": (State, State(1, 0), lambda y: (y.pose, y.gain)),
    "nested": (
        lambda p, g: {"body": [(p,), {}], "other": {"gain": g}},
        {"other": {"gain": 0}, "body": [(1,), {}]},
        lambda y: (y["body"][0][0], y["other"]["gain"]),
    ),
}


def split_residual(p: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Four equations for p and g, every one nonlinear and coupled."""
    of_pose = p**3 + 2 * p + 0.3 * a * torch.sin(p.roll(1, -1)) + g.unsqueeze(-1) * b - b
    of_gain = g**3 + g + 0.2 * (a * p).sum(-1) - b[..., 0] * b[..., 1]
    return of_pose, of_gain


def flat_residual(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    of_pose, of_gain = split_residual(y[..., :3], y[..., 3], a, b)
    return torch.cat([of_pose, of_gain.unsqueeze(-1)], -1)


def unrolled_flat(a: Tensor, b: Tensor) -> Tensor:
    """The solution ``(*batch, 4)`` by Newton's method that torch records."""
    y = torch.zeros(*b.shape[:-1], 4, dtype=b.dtype)
    eye = torch.eye(3, dtype=b.dtype)
    for _ in range(NEWTON_STEPS):
        p, g = y[..., :3], y[..., 3:]
        of_pose = torch.cat(
            [
                (3 * p**2 + 2).unsqueeze(-1) * eye
                + (0.3 * a * torch.cos(p.roll(1, -1))).unsqueeze(-1) * eye.roll(1, 0),
                b.unsqueeze(-1),
            ],
            -1,
        )
        last = torch.cat([(0.2 * a).expand_as(p), 3 * g**2 + 1], -1)
        jacobian = torch.cat([of_pose, last.unsqueeze(-2)], -2)
        y = y - gauss_jordan(jacobian, flat_residual(y, a, b))
    return y


def args(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        0.5 + torch.rand(3, generator=generator, dtype=torch.float64),
        0.5 + torch.rand(*batch, 3, generator=generator, dtype=torch.float64),
    )


def opaque_flat(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The solution ``(*batch, 4)`` in NumPy alone, by Newton's method with differences."""

    def residual(y: np.ndarray) -> np.ndarray:
        p, g = y[..., :3], y[..., 3]
        of_pose = p**3 + 2 * p + 0.3 * a * np.sin(np.roll(p, 1, -1)) + g[..., None] * b - b
        of_gain = g**3 + g + 0.2 * (a * p).sum(-1) - b[..., 0] * b[..., 1]
        return np.concatenate([of_pose, of_gain[..., None]], -1)

    return _numpy_newton(residual, np.zeros((*b.shape[:-1], 4)))


def _numpy_newton(residual: Callable[[np.ndarray], np.ndarray], y: np.ndarray) -> np.ndarray:
    n = y.shape[-1]
    for _ in range(40):
        columns = [(residual(y + 1e-6 * e) - residual(y - 1e-6 * e)) / 2e-6 for e in np.eye(n)]
        y = y - np.linalg.solve(np.stack(columns, -1), residual(y)[..., None])[..., 0]
    return y


# --- power flow of two load buses -----------------------------------------------------------------------

LINES = torch.tensor([0.02 + 0.08j, 0.03 + 0.1j, 0.015 + 0.06j], dtype=torch.complex128).reciprocal()


def mismatch(v: Tensor, s: Tensor, lines: Tensor) -> Tensor:
    """Power that is drawn from two buses minus that which the lines bring; ``(*batch, 2)`` complex."""
    a, b, c = lines.unbind(-1)
    v1, v2 = v.unbind(-1)
    i1 = a * (1.02 - v1) + c * (v2 - v1)
    i2 = b * (1.02 - v2) + c * (v1 - v2)
    return torch.stack([v1 * i1.conj() - s[..., 0], v2 * i2.conj() - s[..., 1]], -1)


def loads(*batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    parts = torch.rand(*batch, 2, 2, generator=generator, dtype=torch.float64)
    return torch.complex(0.4 + 0.3 * parts[..., 0], 0.1 + 0.2 * parts[..., 1])


def unrolled_voltages(s: Tensor, lines: Tensor) -> Tensor:
    """The voltages by Newton's method in real coordinates, its Jacobian from ∂/∂v and ∂/∂v̄ by hand."""
    v = torch.ones_like(s)
    a, b, c = lines.unbind(-1)
    row1, row2 = torch.stack([-a - c, c], -1), torch.stack([c, -b - c], -1)
    admittance = torch.stack([row1, row2], -2)  # ∂i/∂v
    for _ in range(NEWTON_STEPS):
        i1 = a * (1.02 - v[..., 0]) + c * (v[..., 1] - v[..., 0])
        i2 = b * (1.02 - v[..., 1]) + c * (v[..., 0] - v[..., 1])
        of_v = torch.diag_embed(torch.stack([i1, i2], -1).conj())
        of_conjugate = v.unsqueeze(-1) * admittance.conj()
        real = torch.cat([(of_v + of_conjugate).real, (1j * (of_v - of_conjugate)).real], -1)
        imag = torch.cat([(of_v + of_conjugate).imag, (1j * (of_v - of_conjugate)).imag], -1)
        value = mismatch(v, s, lines)
        step = gauss_jordan(torch.cat([real, imag], -2), torch.cat([value.real, value.imag], -1))
        v = v - torch.complex(step[..., :2], step[..., 2:])
    return v


def opaque_voltages(s: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """The voltages in NumPy alone."""
    a, b, c = lines

    def residual(y: np.ndarray) -> np.ndarray:
        v1, v2 = y[..., 0] + 1j * y[..., 1], y[..., 2] + 1j * y[..., 3]
        m1 = v1 * np.conj(a * (1.02 - v1) + c * (v2 - v1)) - s[..., 0]
        m2 = v2 * np.conj(b * (1.02 - v2) + c * (v1 - v2)) - s[..., 1]
        return np.stack([m1.real, m1.imag, m2.real, m2.imag], -1)

    start = np.tile(np.array([1.0, 0.0, 1.0, 0.0]), (*s.shape[:-1], 1))
    y = _numpy_newton(residual, start)
    return y[..., 0::2] + 1j * y[..., 1::2]
