"""The solvers that ship with the core conform."""

from typing import ClassVar

from invlayer_core.testing.pytest_case import SolverConformance


class TestTorchNewton(SolverConformance):
    spec = "torch.newton"


class TestTorchNewtonWithOptions(SolverConformance):
    spec = "torch.newton"
    options: ClassVar = {"maxiter": 50, "xtol": 1e-9, "backtracks": 5}
