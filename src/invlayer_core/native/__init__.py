"""Registration module of the solvers that are written in torch and ship with the core.

They come in through the hook, as every plugin's do; nothing else in the core knows of them.
"""

from invlayer_core.solvers import SolverSpec, hookimpl

__all__ = ["register_solver"]

_EQUATIONS = ("root", "fixed_point")
_RESIDUALS = ("least_squares",)


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the torch solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    return [
        _spec("torch.newton", "newton:Newton", _EQUATIONS),
        _spec("torch.anderson", "anderson:Anderson", _EQUATIONS),
        _spec("torch.broyden", "broyden:Broyden", _EQUATIONS),
        _spec("torch.gauss_newton", "gauss_newton:GaussNewton", _RESIDUALS),
        _spec("torch.levenberg_marquardt", "levenberg_marquardt:LevenbergMarquardt", _RESIDUALS),
        _spec("torch.dogleg", "dogleg:Dogleg", _RESIDUALS),
        _spec("torch.lbfgs", "lbfgs:LBFGS", ("minimize", *_RESIDUALS)),
        _spec("torch.qp", "quadratic:InteriorPoint", ("qp",)),
    ]


def _spec(name: str, where: str, kinds: tuple[str, ...]) -> SolverSpec:
    return SolverSpec(name=name, factory=f"invlayer_core.native.{where}", kinds=kinds, batched=True)
