"""SciPy's root finders and minimisers for invlayer.

This is the registration module. It does not import SciPy: that waits until one of the solvers is used.
"""

from invlayer_core import LinearSolverSpec, SolverSpec, hookimpl

__all__ = ["register_linear_solver", "register_solver"]


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    return [
        _spec("scipy.fsolve", "root:Fsolve"),
        _spec("scipy.root", "root:Root"),
        _spec("scipy.newton", "scalar:Newton", scalar=True),
        *(
            _spec(f"scipy.{name.lower()}", f"scalar:{name}", scalar=True, bracket=True)
            for name in ("Brentq", "Brenth", "Ridder", "Bisect", "Toms748")
        ),
        _spec(
            "scipy.find_root", "elementwise:FindRoot", batched=True, scalar=True, requires=("scipy>=1.15",)
        ),
        _spec("scipy.fixed_point", "fixed_point:FixedPoint", kinds=("fixed_point",)),
        _spec("scipy.solve_ivp", "steady_state:SolveIvp", kinds=("fixed_point",)),
        # Before SciPy 1.16 COBYLA and others held a lock while they called back.
        _spec("scipy.minimize", "minimize:Minimize", kinds=("minimize", "nlp"), requires=("scipy>=1.16",)),
        _spec("scipy.minimize_scalar", "minimize:MinimizeScalar", kinds=("minimize",), scalar=True),
        _spec("scipy.least_squares", "least_squares:LeastSquares", kinds=("least_squares",)),
        _spec("scipy.linprog", "programs:LinProg", kinds=("qp",)),
        _spec("scipy.milp", "programs:Milp", kinds=("qp",)),
    ]


def _spec(
    name: str,
    adapter: str,
    *,
    kinds: tuple[str, ...] = ("root", "fixed_point"),
    requires: tuple[str, ...] = ("scipy>=1.11",),
    batched: bool = False,
    scalar: bool = False,
    bracket: bool = False,
) -> SolverSpec:
    return SolverSpec(
        name=name,
        factory=f"invlayer_scipy.{adapter}",
        kinds=kinds,
        requires=requires,
        install="pip install invlayer-scipy",
        batched=batched,
        # MINPACK has no state of its own, SciPy keeps its callbacks per thread since 1.2 (scipy#8740),
        # and the other methods are Python; tests/test_adapter.py interleaves threads within a solve.
        thread_safe=True,
        scalar=scalar,
        bracket=bracket,
    )


@hookimpl
def register_linear_solver() -> list[LinearSolverSpec]:
    """Describe SuperLU and LSMR; see :meth:`invlayer_core.solvers.SolverHooks.register_linear_solver`."""
    return [_linear("scipy.splu", "superlu:Splu"), _linear("scipy.lsmr", "lsmr:Lsmr")]


def _linear(name: str, adapter: str) -> LinearSolverSpec:
    return LinearSolverSpec(
        name=name,
        factory=f"invlayer_scipy.{adapter}",
        requires=("scipy>=1.11",),
        install="pip install invlayer-scipy",
    )
