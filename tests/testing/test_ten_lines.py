"""A third-party solver in ten lines, and the one call that checks it."""

import numpy as np
import torch

import invlayer_core as inv


class Newton(inv.Solver):
    def solve(self, problem, y0, options):
        if options:
            raise TypeError(f"acme.newton takes no options; got {sorted(options)}.")
        y = y0
        for k in range(50):
            step = np.linalg.solve(problem.jacobian(y), problem.residual(y))
            y = y - step
            if np.linalg.norm(step) <= 1e-9 * np.linalg.norm(y):
                return inv.SolverResult(y=y, success=True, iterations=k + 1)
        return inv.SolverResult(y=y, success=False, message="no convergence in 50 steps")


SPEC = inv.SolverSpec(name="acme.newton", factory=f"{__name__}:Newton", kinds=("root", "fixed_point"))


def test_it_passes_the_conformance_kit():
    report = inv.testing.check_solver(SPEC)
    assert "acme.newton (root, fixed_point): " in report.table()


def test_it_has_gradients_without_more_ado():
    a = torch.tensor([[2.0], [9.0]], dtype=torch.float64, requires_grad=True)
    y = inv.root(lambda y, a: y**2 - a, torch.ones(2, 1, dtype=torch.float64), args=(a,), solver=Newton())
    y.sum().backward()
    torch.testing.assert_close(a.grad, 1 / (2 * a.detach().sqrt()))
