"""A robot that drives in circles: poses of the plane from odometry and from recognised places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import invlayer_core as inv

SE2 = inv.manifolds.SE2()
POSES = 12  # per sample, a lap and a half
DTYPE = torch.float64
STEP = torch.tensor([1.0, 0.0, 2 * torch.pi / 8], dtype=DTYPE)  # forward, and a turn
BIAS = torch.tensor([0.06, -0.04, 0.05], dtype=DTYPE)  # what the odometry adds to each step
ODOMETRY_NOISE, PLACE_NOISE = 0.02, 0.05
WRONG = 0.15  # of the recognised places are others
PLACES = [(i, j) for i in range(POSES) for j in range(i + 3, POSES, 2)]
FROM, TO = (torch.tensor(side) for side in zip(*PLACES, strict=True))


@dataclass(frozen=True)
class Drives:
    """True poses ``(batch, POSES, 4)``, and what was measured between them."""

    truth: Tensor
    odometry: Tensor  # (batch, POSES - 1, 4): each pose from the one before
    places: Tensor  # (batch, places, 4): poses TO, seen from FROM


def draw_drives(count: int, seed: int) -> Drives:
    """Drives with a bias in the odometry, and some places taken for others."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int) -> Tensor:
        return torch.randn(count, size, 3, generator=generator, dtype=DTYPE)

    steps = SE2.exp(STEP + 0.3 * noise(POSES - 1))
    poses = [SE2.identity(STEP).expand(count, 4)]
    for i in range(POSES - 1):
        poses.append(SE2.compose(poses[-1], steps[:, i]))
    truth = torch.stack(poses, 1)
    odometry = SE2.retract(steps, BIAS + ODOMETRY_NOISE * noise(POSES - 1))
    wrong = torch.rand(count, len(PLACES), 1, generator=generator) < WRONG
    seen = SE2.between(truth[:, FROM], truth[:, TO])
    off = torch.where(wrong, 2.0, PLACE_NOISE) * noise(len(PLACES))
    return Drives(truth, odometry, SE2.retract(seen, off))


def dead_reckoning(odometry: Tensor) -> Tensor:
    """The poses by odometry alone, where the optimiser starts."""
    poses = [SE2.identity(odometry).expand(len(odometry), 4)]
    for step in odometry.unbind(1):
        poses.append(SE2.compose(poses[-1], step))
    return torch.stack(poses, 1)


class Costs(torch.nn.Module):
    """The named costs of a drive, with what is to be learned: bias and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3, dtype=DTYPE))
        self.log_weight = torch.nn.Parameter(torch.full((2,), 2.0, dtype=DTYPE))

    def forward(self, poses: Tensor, odometry: Tensor, places: Tensor) -> dict[str, Tensor]:
        odometry_weight, place_weight = self.log_weight.exp()
        steps = SE2.between(poses[..., :-1, :], poses[..., 1:, :])
        seen = SE2.between(poses[..., FROM, :], poses[..., TO, :])
        return {
            "start": 100 * SE2.log(poses[..., 0, :]),
            "odometry": odometry_weight * SE2.local(SE2.retract(odometry, -self.bias), steps),
            "places": place_weight * SE2.local(places, seen),
        }
