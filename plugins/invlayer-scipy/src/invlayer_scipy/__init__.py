"""SciPy's root finders for invlayer: ``scipy.fsolve`` and ``scipy.root``.

This is the registration module. It does not import SciPy: that waits until one of the solvers is used.
"""

from invlayer_core import LinearSolverSpec, SolverSpec, hookimpl

__all__ = ["register_linear_solver", "register_solver"]


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    return [_spec("scipy.fsolve", "Fsolve"), _spec("scipy.root", "Root")]


def _spec(name: str, adapter: str) -> SolverSpec:
    return SolverSpec(
        name=name,
        factory=f"invlayer_scipy.root:{adapter}",
        kinds=("root", "fixed_point"),
        requires=("scipy>=1.11",),
        install="pip install invlayer-scipy",
        batched=False,
        # MINPACK has no state of its own, SciPy keeps its callbacks per thread since 1.2 (scipy#8740),
        # and the other methods are Python; tests/test_adapter.py interleaves threads within a solve.
        thread_safe=True,
    )


@hookimpl
def register_linear_solver() -> LinearSolverSpec:
    """Describe SuperLU; see :meth:`invlayer_core.solvers.SolverHooks.register_linear_solver`."""
    return LinearSolverSpec(
        name="scipy.splu",
        factory="invlayer_scipy.superlu:Splu",
        requires=("scipy>=1.11",),
        install="pip install invlayer-scipy",
    )
