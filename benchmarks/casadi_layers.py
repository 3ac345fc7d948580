"""CasADi's solvers as layers: the backward pass beside CasADi's own sensitivities, and Functions in torch.

The optimal-control problems have 20 stages of multiple shooting, one Runge–Kutta step each. CasADi's own
derivatives are called through buffers, and get the solution; ``min_lam`` is set, without which they fail, or
are wrong, for most constrained problems. A layer's backward pass is read in two ways: *first*, that of a
fresh graph, as every training step has it; and *again*, that of one graph for further cotangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import casadi as ca
import numpy as np
import torch
from harness import After, compare, options
from torch import Tensor

from invlayer_casadi import CasadiFunction, CasadiLayer


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


def buffered(function: ca.Function, inputs: list[np.ndarray]) -> tuple[Callable[[], Any], list[np.ndarray]]:
    """A call that reads and writes arrays in place."""
    buffer, call = function.buffer()
    outputs = [np.zeros(function.nnz_out(i)) for i in range(function.n_out())]
    inputs = [np.ascontiguousarray(array, dtype=np.float64).reshape(-1) for array in inputs]
    for i, array in enumerate(inputs):
        if function.nnz_in(i):
            buffer.set_arg(i, memoryview(array))
    for i, array in enumerate(outputs):
        if array.size:
            buffer.set_res(i, memoryview(array))
    kept = buffer, inputs, outputs  # which CasADi reads and writes in place

    def run() -> None:
        assert kept
        call()

    return run, outputs


def root_finder(batch: int, quick: bool) -> None:
    """Backward through y + A y³ = p, 6 unknowns."""
    y, p = ca.SX.sym("y", 6), ca.SX.sym("p", 6)
    matrix = ca.DM(0.3 * np.eye(6) + 0.05 * np.random.default_rng(0).normal(size=(6, 6)))
    solver = ca.rootfinder("f", "newton", {"x": y, "p": p, "g": y + matrix @ y**3 - p})
    layer = CasadiLayer.from_rootfinder(solver)
    theta = torch.randn(batch, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    solution, cotangent = layer(theta), torch.ones(batch, 6)
    rule = solver.reverse(1)
    values = {
        "x0": np.zeros((batch, 6)), "p": theta.detach().numpy(), "out_x": solution.detach().numpy(),
        "adj_x": cotangent.numpy(),
    }  # fmt: skip
    native, found = buffered(
        rule if batch == 1 else rule.map(batch), [values[rule.name_in(i)] for i in range(rule.n_in())]
    )
    cases = {
        "CasADi's reverse, through buffers": native,
        "layer, backward": lambda: torch.autograd.grad(solution, theta, cotangent, retain_graph=True),
    }
    compare(f"root finder, n = 6, B = {batch}: backward", cases, quick=quick)
    (gradient,) = torch.autograd.grad(solution, theta, cotangent)
    print(f"  gradients differ by {np.abs(gradient.numpy().ravel() - found[-1]).max():.1e}")


def optimal_control(name: str, batch: int, quick: bool) -> None:
    """Backward through a batch of optimal-control problems."""
    problem, given, nominal = control_problem(name)
    layer = CasadiLayer(problem)
    noise = torch.rand(batch, len(nominal), generator=torch.Generator().manual_seed(0))
    p = (torch.from_numpy(nominal) * (1 + 0.1 * noise)).requires_grad_()
    bounds = {key: torch.from_numpy(value) for key, value in given.items()}

    def solve() -> Tensor:
        x: Tensor = layer(p, lbg=0.0, ubg=0.0, **bounds)
        return x

    x = solve()
    cotangent = torch.ones_like(x)
    settings = {"ipopt.print_level": 0, "ipopt.sb": "yes", "print_time": False, "min_lam": 1e-6}
    solver = ca.nlpsol("solver", "ipopt", problem, settings)
    rule = solver.reverse(1)
    points = []
    for row in p.detach().numpy():
        known = {**given, "p": row, "lbg": 0, "ubg": 0}
        found = solver(**known)
        known |= {f"out_{key}": value for key, value in found.items()} | {"adj_x": cotangent[0].numpy()}
        arguments = [ca.DM(known.get(rule.name_in(i), 0)) for i in range(rule.n_in())]
        full = [
            np.array(
                argument if argument.shape == rule.size_in(i) else ca.DM.ones(*rule.size_in(i)) * argument
            )
            for i, argument in enumerate(arguments)
        ]
        points.append(buffered(rule, full))

    def native() -> None:
        for call, _ in points:
            call()

    def fresh() -> None:
        torch.autograd.grad(solve(), p, cotangent)

    def solve_natively() -> None:
        for row in p.detach().numpy():
            solver(**given, p=row, lbg=0, ubg=0)

    cases = {
        "CasADi's reverse, sample by sample": native,
        "layer, first backward": After(solve, lambda x: torch.autograd.grad(x, p, cotangent)),
        "layer, backward again": lambda: torch.autograd.grad(x, p, cotangent, retain_graph=True),
        "CasADi's solver, sample by sample": solve_natively,
        "layer, forward": lambda: solve().detach(),
        "layer, forward and backward": fresh,
    }
    unknowns, constraints = problem["x"].numel(), problem["g"].numel()
    ratios = compare(
        f"{name}, {unknowns} unknowns, {constraints} constraints, B = {batch}", cases, quick=quick
    )
    rest = ratios["layer, forward and backward"] - ratios["layer, forward"]
    print(f"  forward and backward less forward: x {rest:.2f}, a difference of large numbers")
    found = np.concatenate([outputs[rule.index_out("adj_p")] for _, outputs in points])
    (gradient,) = torch.autograd.grad(x, p, cotangent)
    print(f"  gradients differ by {np.abs(gradient.numpy().ravel() - found).max():.1e}")


def translation(batch: int, quick: bool) -> None:
    """One Runge–Kutta step of the quadrotor, forward and backward."""
    x, u, theta = ca.SX.sym("x", 13), ca.SX.sym("u", 4), ca.SX.sym("theta", 3)
    step = ca.Function("step", [x, u, theta], [runge_kutta(lambda x, u: quadrotor(x, u, theta), x, u, 0.02)])
    generator = torch.Generator().manual_seed(0)
    inputs = [(0.5 + torch.rand(batch, n, generator=generator)).requires_grad_() for n in (13, 4, 3)]
    plain = [tensor.detach() for tensor in inputs]
    arrays = [tensor.numpy() for tensor in plain]
    whole = step.map(batch)
    mapped, _ = buffered(whole, arrays)
    columns = [np.ascontiguousarray(array.T) for array in arrays]
    functions = {name: CasadiFunction(step, backend=name) for name in ("casadi", "torch")}

    def both(function: CasadiFunction) -> None:
        torch.autograd.grad(function(*inputs).sum(), inputs)

    cases = {
        "CasADi's map, through buffers": mapped,
        "CasADi's map, a plain call": lambda: whole(*columns),
        "CasadiFunction, casadi": lambda: functions["casadi"](*plain),
        "CasadiFunction, torch": lambda: functions["torch"](*plain),
        "forward and backward, casadi": lambda: both(functions["casadi"]),
        "forward and backward, torch": lambda: both(functions["torch"]),
    }
    compare(f"quadrotor step, {step.n_instructions()} instructions, B = {batch}", cases, quick=quick)


def main() -> None:
    quick = options().quick
    for batch in (1, 2000):
        root_finder(batch, quick)
    for name in ("cart_pole",) if quick else ("cart_pole", "quadrotor"):
        optimal_control(name, 8, quick)
    for batch in (1, 10_000):
        translation(batch, quick)


if __name__ == "__main__":
    main()
