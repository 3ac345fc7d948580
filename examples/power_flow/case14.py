"""The IEEE 14-bus test case: bus, generator and branch tables, and the bus admittance matrix.

Source: IEEE 14 Bus Test Case, Power Systems Test Case Archive, University of Washington
(https://labs.ece.uw.edu/pstca/), a part of the American Electric Power system as of February 1962;
the numbers as carried in MATPOWER's ``data/case14.m`` (https://github.com/MATPOWER/matpower).

Powers are tabulated in MW and Mvar, everything else in per unit on a base of 100 MVA.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "BASE_MVA",
    "BRANCHES",
    "BUSES",
    "GENERATORS",
    "GENERATOR_BUSES",
    "LOAD_BUSES",
    "PQ_BUSES",
    "PUBLISHED_VA_DEG",
    "PUBLISHED_VM",
    "P_LOAD",
    "Q_LOAD",
    "SET_POINTS",
    "admittance",
    "injections",
]

BASE_MVA = 100.0

# bus, load P [MW], load Q [Mvar], shunt B [Mvar at 1 p.u.], solved |V| [p.u.], solved angle [degrees]
BUSES = torch.tensor(
    [
        [1, 0.0, 0.0, 0.0, 1.060, 0.00],
        [2, 21.7, 12.7, 0.0, 1.045, -4.98],
        [3, 94.2, 19.0, 0.0, 1.010, -12.72],
        [4, 47.8, -3.9, 0.0, 1.019, -10.33],
        [5, 7.6, 1.6, 0.0, 1.020, -8.78],
        [6, 11.2, 7.5, 0.0, 1.070, -14.22],
        [7, 0.0, 0.0, 0.0, 1.062, -13.37],
        [8, 0.0, 0.0, 0.0, 1.090, -13.36],
        [9, 29.5, 16.6, 19.0, 1.056, -14.94],
        [10, 9.0, 5.8, 0.0, 1.051, -15.10],
        [11, 3.5, 1.8, 0.0, 1.057, -14.79],
        [12, 6.1, 1.6, 0.0, 1.055, -15.07],
        [13, 13.5, 5.8, 0.0, 1.050, -15.16],
        [14, 14.9, 5.0, 0.0, 1.036, -16.04],
    ],
    dtype=torch.float64,
)

# bus, generated P [MW], voltage set-point [p.u.]; bus 1 is the slack, 3, 6 and 8 are synchronous condensers
GENERATORS = torch.tensor(
    [[1, 232.4, 1.060], [2, 40.0, 1.045], [3, 0.0, 1.010], [6, 0.0, 1.070], [8, 0.0, 1.090]],
    dtype=torch.float64,
)

# from bus, to bus, r, x, total line charging b [p.u.], tap ratio at the from bus (0: a line, no transformer)
BRANCHES = torch.tensor(
    [
        [1, 2, 0.01938, 0.05917, 0.0528, 0.0],
        [1, 5, 0.05403, 0.22304, 0.0492, 0.0],
        [2, 3, 0.04699, 0.19797, 0.0438, 0.0],
        [2, 4, 0.05811, 0.17632, 0.0340, 0.0],
        [2, 5, 0.05695, 0.17388, 0.0346, 0.0],
        [3, 4, 0.06701, 0.17103, 0.0128, 0.0],
        [4, 5, 0.01335, 0.04211, 0.0, 0.0],
        [4, 7, 0.0, 0.20912, 0.0, 0.978],
        [4, 9, 0.0, 0.55618, 0.0, 0.969],
        [5, 6, 0.0, 0.25202, 0.0, 0.932],
        [6, 11, 0.09498, 0.19890, 0.0, 0.0],
        [6, 12, 0.12291, 0.25581, 0.0, 0.0],
        [6, 13, 0.06615, 0.13027, 0.0, 0.0],
        [7, 8, 0.0, 0.17615, 0.0, 0.0],
        [7, 9, 0.0, 0.11001, 0.0, 0.0],
        [9, 10, 0.03181, 0.08450, 0.0, 0.0],
        [9, 14, 0.12711, 0.27038, 0.0, 0.0],
        [10, 11, 0.08205, 0.19207, 0.0, 0.0],
        [12, 13, 0.22092, 0.19988, 0.0, 0.0],
        [13, 14, 0.17093, 0.34802, 0.0, 0.0],
    ],
    dtype=torch.float64,
)

P_LOAD, Q_LOAD = BUSES[:, 1] / BASE_MVA, BUSES[:, 2] / BASE_MVA  # (14,) p.u.
PUBLISHED_VM, PUBLISHED_VA_DEG = BUSES[:, 4], BUSES[:, 5]  # (14,)
SET_POINTS = GENERATORS[:, 2]  # (5,) p.u.

# Rows, counted from 0, of the buses with a held voltage, with a free voltage (PQ), and with a real load.
GENERATOR_BUSES = GENERATORS[:, 0].long() - 1
PQ_BUSES = torch.tensor([bus for bus in range(len(BUSES)) if bus not in GENERATOR_BUSES.tolist()])
LOAD_BUSES = torch.nonzero(P_LOAD).flatten()


def admittance() -> tuple[Tensor, Tensor]:
    r"""Bus admittance matrix Y = G + jB, with I = Y V.

    A branch of series admittance y, charging b and tap ratio t on its from side is a two-port:

        [I_from]   [(y + jb/2) / t²   -y / t   ] [V_from]
        [I_to  ] = [     -y / t        y + jb/2] [V_to  ]

    and Y sums the two-ports of all branches plus the shunts on its diagonal. No branch shifts the phase
    (t is real), so Y is symmetric.

    Returns
    -------
    G, B : Tensor, (14, 14)
        Conductance and susceptance in p.u.
    """
    r, x, charging, tap = BRANCHES[:, 2:].unbind(1)
    start, end = BRANCHES[:, 0].long() - 1, BRANCHES[:, 1].long() - 1
    tap = torch.where(tap == 0, 1.0, tap)
    series = 1 / torch.complex(r, x)
    own = series + 0.5j * charging

    y = torch.diag(1j * BUSES[:, 3] / BASE_MVA)
    y.index_put_((start, start), own / tap**2, accumulate=True)
    y.index_put_((end, end), own, accumulate=True)
    y.index_put_((start, end), -series / tap, accumulate=True)
    y.index_put_((end, start), -series / tap, accumulate=True)
    return y.real.clone(), y.imag.clone()


def injections(load_factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Scheduled net injections, generation minus load, with every bus's load scaled.

    Parameters
    ----------
    load_factor : Tensor, (*batch, 14), or float
        Factor on the real and the reactive load of each bus.

    Returns
    -------
    p : Tensor, (*batch, 13)
        Real injections in p.u. at buses 2..14. The slack (bus 1) covers the rest.
    q : Tensor, (*batch, 9)
        Reactive injections in p.u. at the PQ buses.
    """
    generation = torch.zeros_like(P_LOAD)
    generation[GENERATOR_BUSES] = GENERATORS[:, 1] / BASE_MVA
    p = generation - load_factor * P_LOAD
    q = -load_factor * Q_LOAD
    return p[..., 1:], q[..., PQ_BUSES]
