"""AC power flow: what the voltages of a network satisfy, written in torch.

The unknown y holds, for one flow, the 13 angles of buses 2..14 in rad (bus 1 is the reference) and the 9
voltage magnitudes of the PQ buses in p.u.:

    y = (a2 … a14, v4 v5 v7 v9 v10 v11 v12 v13 v14)

The five held magnitudes (buses 1, 2, 3, 6, 8) are not unknowns but parameters, the *set-points*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from case14 import GENERATOR_BUSES, PQ_BUSES, admittance

__all__ = ["bus_powers", "flat_start", "losses", "mismatch", "voltages"]

G, B = admittance()
N_BUSES = len(G)
N_ANGLES = N_BUSES - 1
N_UNKNOWNS = N_ANGLES + len(PQ_BUSES)

# 0/1 matrices that put unknowns and set-points in their places among the 14 buses. A product broadcasts a
# shared set-point vector over a batch by itself, where concatenation would need every operand expanded first.
_BUS = torch.eye(N_BUSES, dtype=torch.float64)
ANGLES = torch.cat([_BUS[1:], torch.zeros_like(_BUS[PQ_BUSES])])  # (22, 14)
MAGNITUDES = torch.cat([torch.zeros_like(_BUS[1:]), _BUS[PQ_BUSES]])  # (22, 14)
HELD = _BUS[GENERATOR_BUSES]  # (5, 14)


def flat_start(*batch: int) -> Tensor:
    """Return the customary first guess, (*batch, 22): all angles 0 rad, all free magnitudes 1 p.u."""
    y = torch.zeros(*batch, N_UNKNOWNS, dtype=torch.float64)
    y[..., N_ANGLES:] = 1.0
    return y


def voltages(y: Tensor, set_points: Tensor) -> tuple[Tensor, Tensor]:
    """Voltage magnitude and angle of every bus.

    Parameters
    ----------
    y : Tensor, (*batch, 22)
        Unknowns of the flow.
    set_points : Tensor, (*batch, 5) or (5,)
        Held magnitudes of buses 1, 2, 3, 6, 8 in p.u.

    Returns
    -------
    magnitude, angle : Tensor, (*batch, 14)
        In p.u. and rad.
    """
    return y @ MAGNITUDES + set_points @ HELD, y @ ANGLES


def bus_powers(y: Tensor, set_points: Tensor) -> tuple[Tensor, Tensor]:
    """Real and reactive power that flows from every bus into the network, (*batch, 14) each, in p.u.

    With V = e + jf, I = Y V and S = V conj(I), in real arithmetic:

        Re I = G e - B f        P = e Re I + f Im I
        Im I = G f + B e        Q = f Re I - e Im I

    The products below take row vectors from the left, which is the same because Y is symmetric.
    """
    magnitude, angle = voltages(y, set_points)
    e, f = magnitude * angle.cos(), magnitude * angle.sin()
    current_re, current_im = e @ G - f @ B, f @ G + e @ B
    return e * current_re + f * current_im, f * current_re - e * current_im


def mismatch(y: Tensor, set_points: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Power-flow equations F(y, set_points, p, q) = 0: calculated minus scheduled injections.

    Every argument after ``y`` is either batched like ``y`` or shared by the whole batch.

    Parameters
    ----------
    y : Tensor, (*batch, 22)
        Angles of buses 2..14 in rad, magnitudes of the PQ buses in p.u.
    set_points : Tensor, (*batch, 5) or (5,)
        Held magnitudes of buses 1, 2, 3, 6, 8 in p.u.
    p : Tensor, (*batch, 13) or (13,)
        Scheduled real injections of buses 2..14 in p.u.
    q : Tensor, (*batch, 9) or (9,)
        Scheduled reactive injections of the PQ buses in p.u.

    Returns
    -------
    Tensor, (*batch, 22)
        Real mismatches of buses 2..14, then reactive mismatches of the PQ buses, in p.u.
    """
    p_bus, q_bus = bus_powers(y, set_points)
    return torch.cat([p_bus[..., 1:] - p, q_bus[..., PQ_BUSES] - q], dim=-1)


def losses(y: Tensor, set_points: Tensor) -> Tensor:
    """Total real losses, (*batch,), in p.u.: the sum over all buses, slack included, of what they feed in."""
    p_bus, _ = bus_powers(y, set_points)
    return p_bus.sum(-1)
