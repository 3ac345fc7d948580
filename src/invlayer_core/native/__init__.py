"""Registration module of the solvers that are written in torch and ship with the core.

They come in through the hook, as every plugin's do; nothing else in the core knows of them.
"""

from invlayer_core.solvers import SolverSpec, hookimpl

__all__ = ["register_solver"]


@hookimpl
def register_solver() -> list[SolverSpec]:
    """Describe the torch solvers; see :meth:`invlayer_core.solvers.SolverHooks.register_solver`."""
    return [
        SolverSpec(
            name="torch.newton",
            factory="invlayer_core.native.newton:Newton",
            kinds=("root", "fixed_point"),
            batched=True,
        ),
        SolverSpec(
            name="torch.qp",
            factory="invlayer_core.native.quadratic:InteriorPoint",
            kinds=("qp",),
            batched=True,
            bounds=True,
            constraints=True,
        ),
    ]
