"""Rotations and poses of space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Size, Tensor

from invlayer_core.manifolds.manifold import LieGroup
from invlayer_core.manifolds.series import (
    chord,
    cubic_remainder,
    half_cosine,
    half_sine,
    rotation_angle_ratio,
)

__all__ = ["SE3", "SO3"]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(*torch.broadcast_tensors(a, b))


def _squared(vector: Tensor) -> Tensor:
    return vector.square().sum(-1, keepdim=True)


@final
@dataclass(frozen=True)
class SO3(LieGroup):
    """Rotations of space: a point is a unit quaternion (x, y, z, w), δ a rotation vector in the body frame.

    The order is that of SciPy's ``Rotation`` and of pypose. q and −q are one rotation.

    Examples
    --------
    >>> import torch
    >>> SO3().exp(torch.zeros(3))
    tensor([0., 0., 0., 1.])
    """

    shape = Size([4])
    tangent_size = 3

    def exp(self, delta: Tensor) -> Tensor:
        s = _squared(delta)
        return torch.cat([half_sine(s) * delta, half_cosine(s)], -1)

    def log(self, y: Tensor) -> Tensor:
        near = torch.where(y[..., 3:] < 0, -y, y)  # of q and −q the one that turns by less than π
        vector, scalar = near[..., :3], near[..., 3:]
        return rotation_angle_ratio(_squared(vector), scalar) * vector

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        (u, a), (v, b) = first.split((3, 1), -1), second.split((3, 1), -1)
        scalar = a * b - (u * v).sum(-1, keepdim=True)
        return torch.cat([a * v + b * u + _cross(u, v), scalar], -1)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.cat([-y[..., :3], y[..., 3:]], -1)

    def act(self, y: Tensor, points: Tensor) -> Tensor:
        vector, scalar = y.split((3, 1), -1)
        twice = 2 * _cross(vector, points)
        return points + scalar * twice + _cross(vector, twice)

    def matrix(self, y: Tensor) -> Tensor:
        """The rotation matrix, ``(*batch, 3, 3)``."""
        axes = torch.eye(3, dtype=y.dtype, device=y.device)
        return self.act(y.unsqueeze(-2), axes).mT

    def project(self, y: Tensor) -> Tensor:
        return y / y.norm(dim=-1, keepdim=True)


@final
@dataclass(frozen=True)
class SE3(LieGroup):
    """Poses in space: a point is (translation, quaternion) as in pypose, 7 numbers; δ is (ρ, ω), 6.

    exp is that of the group: a motion with constant velocity ρ and turn ω in the body frame.

    Examples
    --------
    >>> import torch
    >>> SE3().exp(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0]))
    tensor([1., 2., 3., 0., 0., 0., 1.])
    """

    shape = Size([7])
    tangent_size = 6

    def exp(self, delta: Tensor) -> Tensor:
        rho, omega = delta.split((3, 3), -1)
        s = _squared(omega)
        half, cross = half_sine(s), _cross(omega, rho)
        # V ρ with V = I + (1 − cos θ)/θ² [ω] + (θ − sin θ)/θ³ [ω]²
        moved = rho + 2 * half.square() * cross + cubic_remainder(s) * _cross(omega, cross)
        return torch.cat([moved, half * omega, half_cosine(s)], -1)

    def log(self, y: Tensor) -> Tensor:
        moved, omega = y[..., :3], SO3().log(y[..., 3:])
        cross = _cross(omega, moved)
        # V⁻¹ = I − ½ [ω] + (1 − (θ/2) cot(θ/2))/θ² [ω]²
        rho = moved - 0.5 * cross + chord(_squared(omega)) * _cross(omega, cross)
        return torch.cat([rho, omega], -1)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        moved = self.act(first, second[..., :3])
        return torch.cat([moved, SO3().compose(first[..., 3:], second[..., 3:])], -1)

    def inverse(self, y: Tensor) -> Tensor:
        back = SO3().inverse(y[..., 3:])
        return torch.cat([-SO3().act(back, y[..., :3]), back], -1)

    def act(self, y: Tensor, points: Tensor) -> Tensor:
        return SO3().act(y[..., 3:], points) + y[..., :3]

    def matrix(self, y: Tensor) -> Tensor:
        """The homogeneous matrix, ``(*batch, 4, 4)``."""
        top = torch.cat([SO3().matrix(y[..., 3:]), y[..., :3, None]], -1)
        bottom = torch.zeros_like(top[..., :1, :])
        return torch.cat([top, torch.cat([bottom[..., :3], bottom[..., 3:] + 1], -1)], -2)

    def project(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :3], SO3().project(y[..., 3:])], -1)

    def scale(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :3], torch.ones_like(y[..., :3])], -1)
