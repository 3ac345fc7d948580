"""The optimal-control problems of the CasADi benchmarks: 20 stages, multiple shooting, one Runge–Kutta step each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import casadi as ca
import numpy as np


def runge_kutta(f: Callable[[Any, Any], Any], x: Any, u: Any, h: float) -> Any:
    """One classical step of ẋ = f(x, u)."""
    k1 = f(x, u)
    k2 = f(x + h / 2 * k1, u)
    k3 = f(x + h / 2 * k2, u)
    k4 = f(x + h * k3, u)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def cart_pole(x: Any, u: Any, theta: Any) -> Any:
    """Position, angle from upright and their velocities; θ = (mass of the pole, its length)."""
    mass, length = theta[0], theta[1]
    sine, cosine, force = ca.sin(x[1]), ca.cos(x[1]), u[0]
    total = 1.0 + mass * sine**2
    acceleration = (force + mass * sine * (length * x[3] ** 2 - 9.81 * cosine)) / total
    turning = (9.81 * sine - acceleration * cosine) / length
    return ca.vertcat(x[2], x[3], acceleration, turning)


def quadrotor(x: Any, u: Any, theta: Any) -> Any:
    """Position, velocity, quaternion and rates; θ = (mass, two moments of inertia)."""
    v, q, w = x[3:6], x[6:10], x[10:13]
    inertia = ca.vertcat(theta[1], theta[1], theta[2])
    lift = ca.sum1(u) / theta[0]
    a = ca.vertcat(
        2 * (q[0] * q[2] + q[1] * q[3]) * lift,
        2 * (q[2] * q[3] - q[0] * q[1]) * lift,
        (q[0] ** 2 - q[1] ** 2 - q[2] ** 2 + q[3] ** 2) * lift - 9.81,
    )
    turn = 0.5 * ca.vertcat(
        -q[1] * w[0] - q[2] * w[1] - q[3] * w[2],
        q[0] * w[0] + q[2] * w[2] - q[3] * w[1],
        q[0] * w[1] - q[1] * w[2] + q[3] * w[0],
        q[0] * w[2] + q[1] * w[1] - q[2] * w[0],
    )
    torque = ca.vertcat(0.2 * (u[0] - u[2]), 0.2 * (u[1] - u[3]), 0.01 * (u[0] - u[1] + u[2] - u[3]))
    return ca.vertcat(v, a, turn, (torque - ca.cross(w, inertia * w)) / inertia)


def control_problem(name: str, stages: int = 20) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """The program, its bounds and guess, and the nominal parameters (initial state, θ)."""
    model, nx, nu, nt, h = {
        "cart_pole": (cart_pole, 4, 1, 2, 0.05),
        "quadrotor": (quadrotor, 13, 4, 3, 0.05),
    }[name]
    states, controls = ca.SX.sym("x", nx, stages + 1), ca.SX.sym("u", nu, stages)
    p = ca.SX.sym("p", nx + nt)
    goal, hover = np.zeros(nx), np.zeros(nu)
    weight, limit = np.ones(nx), np.full(nu, 10.0)
    nominal = np.array([0.0, 0.4, 0.0, 0.0, 0.2, 0.5])
    lower = -limit
    if name == "quadrotor":
        goal[6], hover, lower, limit = 1.0, np.full(nu, 9.81 / 4), np.zeros(nu), np.full(nu, 4.0)
        nominal = np.array([0.5, -0.3, 0.2, *[0.0] * 3, 1.0, 0.05, 0.0, 0.0, *[0.0] * 3, 1.0, 0.02, 0.03])
    cost, rows = 0, [states[:, 0] - p[:nx]]
    for k in range(stages):
        gap, push = states[:, k] - goal, controls[:, k] - hover
        cost += ca.dot(weight * gap, gap) + 0.01 * ca.dot(push, push)
        step = runge_kutta(lambda x, u: model(x, u, p[nx:]), states[:, k], controls[:, k], h)
        rows.append(states[:, k + 1] - step)
    last = states[:, -1] - goal
    cost += 10 * ca.dot(last, last)
    x = ca.vertcat(ca.vec(states), ca.vec(controls))
    free = np.full(nx * (stages + 1), np.inf)
    bounds = {
        "lbx": np.concatenate([-free, np.tile(lower, stages)]),
        "ubx": np.concatenate([free, np.tile(limit, stages)]),
        "x0": np.concatenate([np.tile(nominal[:nx], stages + 1), np.tile(hover, stages)]),
    }
    return {"x": x, "p": p, "f": cost, "g": ca.vertcat(*rows)}, bounds, nominal
