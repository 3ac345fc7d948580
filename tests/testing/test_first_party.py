"""The solvers that ship with the core conform."""

from typing import ClassVar

from invlayer_core.testing.pytest_case import SolverConformance


class TestTorchNewton(SolverConformance):
    spec = "torch.newton"


class TestTorchNewtonWithOptions(SolverConformance):
    spec = "torch.newton"
    options: ClassVar = {"maxiter": 50, "xtol": 1e-9, "backtracks": 5}


class TestTorchAnderson(SolverConformance):
    spec = "torch.anderson"


class TestTorchBroyden(SolverConformance):
    spec = "torch.broyden"


class TestTorchGaussNewton(SolverConformance):
    spec = "torch.gauss_newton"


class TestTorchLevenbergMarquardt(SolverConformance):
    spec = "torch.levenberg_marquardt"


class TestTorchDogleg(SolverConformance):
    spec = "torch.dogleg"


class TestTorchLBFGS(SolverConformance):
    spec = "torch.lbfgs"
