"""Small solvers that keep every rule: Newton's method, per sample in NumPy and batched in torch; Picard's."""

from typing import Any

import numpy as np
import torch

from invlayer_core import Solver, SolverResult, SolverSpec

STEPS = 60


def spec_of(solver: type[Solver], **fields: Any) -> SolverSpec:
    """The spec of a class, not registered anywhere."""
    declared = {
        "name": f"toy.{solver.__name__.lower()}",
        "factory": f"{solver.__module__}:{solver.__qualname__}",
        "kinds": ("root", "fixed_point"),
        "batched": solver.batched,
    }
    return SolverSpec(**(declared | fields))


def read_options(options, *accepted):
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise TypeError(f"unknown options {unknown}; accepted are {list(accepted)}")
    return options.get("xtol", 1e-9)


def numpy_newton(problem, y, xtol=1e-9):
    for k in range(STEPS):
        step = np.linalg.solve(problem.jacobian(y), problem.residual(y))
        y = y - step
        if np.abs(step).max() <= xtol * (1 + np.abs(y).max()):
            return SolverResult(y=y, success=True, iterations=k + 1)
    return SolverResult(y=y, success=False, iterations=STEPS, message=f"no convergence in {STEPS} steps")


def torch_step(problem, y):
    step, _ = torch.linalg.solve_ex(problem.jacobian(y), problem.residual(y).unsqueeze(-1))
    return step.squeeze(-1)


def torch_newton(problem, y):
    """Every sample stops by itself."""
    done = torch.zeros(len(y), dtype=torch.bool)
    xtol = torch.finfo(y.dtype).eps ** 0.6
    for _ in range(STEPS):
        step = torch_step(problem, y)
        y = torch.where(done.unsqueeze(-1), y, y - step)
        done = done | (step.abs() <= xtol * (1 + y.abs())).all(-1)
        if done.all():
            break
    return SolverResult(y=y, success=done)


class NumpyNewton(Solver):
    def solve(self, problem, y0, options):
        return numpy_newton(problem, y0, read_options(options, "xtol"))


class TorchNewton(Solver):
    batched = True

    def solve(self, problem, y0, options):
        read_options(options)
        return torch_newton(problem, y0)


class Picard(Solver):
    """y ← T(y) = y + F(y); for fixed points only."""

    batched = True

    def solve(self, problem, y0, options):
        read_options(options)
        y, xtol = y0, 50 * torch.finfo(y0.dtype).eps
        done = torch.zeros(len(y), dtype=torch.bool)
        for _ in range(500):
            step = problem.residual(y)
            y = torch.where(done.unsqueeze(-1), y, y + step)
            done = done | (step.abs() <= xtol * (1 + y.abs())).all(-1)
            if done.all():
                break
        return SolverResult(y=y, success=done)
