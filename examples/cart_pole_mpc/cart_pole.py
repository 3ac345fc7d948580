"""Model predictive control of a cart with a pole, as one layer: (state, model) ↦ the plan.

The pole is to be balanced upright, the cart brought back to the origin. Twenty stages of 50 ms, direct
multiple shooting (Bock & Plitt 1984), one classical Runge–Kutta step each: 104 unknowns, 84 equations, forces
within bounds.
"""

from __future__ import annotations

from typing import Any

import casadi as ca
import torch
from torch import Tensor

from invlayer_casadi import CasadiLayer

__all__ = ["FORCE_LIMIT", "STAGES", "STEP", "forces", "make_controller", "plan"]

STAGES, STEP, FORCE_LIMIT = 20, 0.05, 8.0
_STATES = 4  # position, angle from upright, and their velocities


def _motion(state: Any, force: Any, mass: Any, length: Any) -> Any:
    """ẋ for a cart of 1 kg and a pole whose mass is a point at its end (Barto, Sutton & Anderson 1983)."""
    sine, cosine = ca.sin(state[1]), ca.cos(state[1])
    total = 1.0 + mass * sine**2
    acceleration = (force + mass * sine * (length * state[3] ** 2 - 9.81 * cosine)) / total
    turning = (9.81 * sine - acceleration * cosine) / length
    return ca.vertcat(state[2], state[3], acceleration, turning)


def _step(state: Any, force: Any, model: Any) -> Any:
    """One classical Runge–Kutta step; the model is the logarithms of mass and length."""
    f = lambda s: _motion(s, force, ca.exp(model[0]), ca.exp(model[1]))  # noqa: E731
    k1 = f(state)
    k2 = f(state + STEP / 2 * k1)
    k3 = f(state + STEP / 2 * k2)
    k4 = f(state + STEP * k3)
    return state + STEP / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def make_controller(**keywords: Any) -> CasadiLayer:
    """The layer; p is the state now and the model, ``(*batch, 6)``, x the states and forces of the plan."""
    states, force = ca.SX.sym("s", _STATES, STAGES + 1), ca.SX.sym("u", STAGES)
    p = ca.SX.sym("p", _STATES + 2)
    weights = ca.DM([1.0, 2.0, 0.1, 0.1])
    cost: Any = 0
    equations = [states[:, 0] - p[:_STATES]]
    for k in range(STAGES):
        cost += ca.dot(weights * states[:, k], states[:, k]) + 0.01 * force[k] ** 2
        equations.append(states[:, k + 1] - _step(states[:, k], force[k], p[_STATES:]))
    cost += 10 * ca.dot(weights * states[:, -1], states[:, -1])
    x = ca.vertcat(ca.vec(states), force)
    return CasadiLayer({"x": x, "p": p, "f": cost, "g": ca.vertcat(*equations)}, **keywords)


def plan(controller: CasadiLayer, state: Tensor, model: Tensor) -> Any:
    """Solve for a batch of states ``(B, 4)`` and one model ``(2,)``, or one for each."""
    p = torch.cat([state, model.expand(*state.shape[:-1], 2)], -1)
    free = torch.full((_STATES * (STAGES + 1),), torch.inf, dtype=p.dtype)
    limit = torch.cat([free, torch.full((STAGES,), FORCE_LIMIT, dtype=p.dtype)])
    resting = torch.zeros(*state.shape[:-1], STAGES, dtype=p.dtype)
    start = torch.cat([state.detach().repeat(*(1 for _ in state.shape[:-1]), STAGES + 1), resting], -1)
    return controller(p, x0=start, lbx=-limit, ubx=limit, lbg=0.0, ubg=0.0)


def forces(x: Tensor) -> Tensor:
    """The planned forces, ``(*batch, STAGES)``."""
    return x[..., _STATES * (STAGES + 1) :]
