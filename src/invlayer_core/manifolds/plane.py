"""Rotations and poses of the plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Size, Tensor

from invlayer_core.manifolds.manifold import LieGroup
from invlayer_core.manifolds.series import chord, half_cosine, half_sine

__all__ = ["SE2", "SO2"]


@final
@dataclass(frozen=True)
class SO2(LieGroup):
    """Rotations of the plane: a point is (cos φ, sin φ), δ an angle in radians.

    Examples
    --------
    >>> import torch
    >>> SO2().exp(torch.tensor([0.0]))
    tensor([1., 0.])
    """

    shape = Size([2])
    tangent_size = 1

    def exp(self, delta: Tensor) -> Tensor:
        return torch.cat([delta.cos(), delta.sin()], -1)

    def log(self, y: Tensor) -> Tensor:
        return torch.atan2(y[..., 1:], y[..., :1])

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        return self.act(first, second)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], -y[..., 1:]], -1)

    def act(self, y: Tensor, points: Tensor) -> Tensor:
        (cosine, sine), (a, b) = y.unbind(-1), points.unbind(-1)
        return torch.stack([cosine * a - sine * b, sine * a + cosine * b], -1)

    def matrix(self, y: Tensor) -> Tensor:
        """The rotation matrix, ``(*batch, 2, 2)``."""
        cosine, sine = y.unbind(-1)
        return torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)

    def project(self, y: Tensor) -> Tensor:
        return y / y.norm(dim=-1, keepdim=True)


@final
@dataclass(frozen=True)
class SE2(LieGroup):
    """Poses in the plane: a point is (x, y, cos φ, sin φ), as in Theseus; δ is (ρ₁, ρ₂, angle).

    exp is that of the group: a motion with constant velocity in the body frame.

    Examples
    --------
    >>> import torch
    >>> SE2().exp(torch.tensor([1.0, 2.0, 0.0]))
    tensor([1., 2., 1., 0.])
    """

    shape = Size([4])
    tangent_size = 3

    def exp(self, delta: Tensor) -> Tensor:
        rho, angle = delta[..., :2], delta[..., 2:]
        s = angle.square()
        half = half_sine(s)
        turning = torch.cat(
            [2 * half * half_cosine(s), 2 * half.square() * angle], -1
        )  # sin θ, 1 − cos θ, by θ
        return torch.cat([SO2().act(turning, rho), SO2().exp(angle)], -1)

    def log(self, y: Tensor) -> Tensor:
        angle = SO2().log(y[..., 2:])
        s = angle.square()
        turning = torch.cat([1 - s * chord(s), -0.5 * angle], -1)  # the inverse of the matrix in exp
        return torch.cat([SO2().act(turning, y[..., :2]), angle], -1)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        moved = self.act(first, second[..., :2])
        return torch.cat([moved, SO2().compose(first[..., 2:], second[..., 2:])], -1)

    def inverse(self, y: Tensor) -> Tensor:
        back = SO2().inverse(y[..., 2:])
        return torch.cat([-SO2().act(back, y[..., :2]), back], -1)

    def act(self, y: Tensor, points: Tensor) -> Tensor:
        return SO2().act(y[..., 2:], points) + y[..., :2]

    def matrix(self, y: Tensor) -> Tensor:
        """The homogeneous matrix, ``(*batch, 3, 3)``."""
        top = torch.cat([SO2().matrix(y[..., 2:]), y[..., :2, None]], -1)
        bottom = torch.zeros_like(top[..., :1, :])
        return torch.cat([top, torch.cat([bottom[..., :2], bottom[..., 2:] + 1], -1)], -2)

    def project(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :2], SO2().project(y[..., 2:])], -1)

    def scale(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :2], torch.ones_like(y[..., :1])], -1)
