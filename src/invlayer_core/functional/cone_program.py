"""Cone programs: QP, SOCP, SDP, entropy and geometric programs in standard form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords, find_solver, read_settings
from invlayer_core.certificate import SolveInfo
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.cone import ConeConditions, ConeSolution
from invlayer_core.conditions.cone_jacobian import ConeJacobian
from invlayer_core.conditions.cones.structure import ConeStructure
from invlayer_core.errors import ConditionsError
from invlayer_core.execution.cone import ConeForward
from invlayer_core.functional.polyhedral_program import has_active_set, solve_on_active_set
from invlayer_core.implicit import Settings, solve_implicitly
from invlayer_core.inputs import outside_inference_mode
from invlayer_core.solvers.contract import Solver
from invlayer_core.structure import Arguments

__all__ = ["cone_program"]


def cone_program(
    P: Tensor,
    q: Tensor,
    A: Tensor,
    b: Tensor,
    structure: ConeStructure,
    *,
    solver: str | Solver,
    options: Mapping[str, Any] | None = None,
    start: ConeSolution | None = None,
    workers: int = 1,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Minimise ½ xᵀP x + qᵀx subject to A x + s = b, s ∈ K, and differentiate x, y, s by P, q, A, b.

    Computed in float64 whatever the dtype of the arguments is; results have that of ``q``.

    Parameters
    ----------
    P, A : Tensor of shape ``(*batch, nnz)`` or ``(nnz,)``
        The entries of the upper triangle of P, and those of A, in the order of ``structure``.
    q : Tensor of shape ``(*batch, n)`` or ``(n,)``
    b : Tensor of shape ``(*batch, m)`` or ``(m,)``
    structure : ConeStructure
        K, and where P and A can be non-zero.
    solver : str or Solver
        A registered name of the kind ``"cone"``, such as ``"cvxpy.clarabel"``, or an instance.
    options : mapping, optional
        The solver's own options.
    start : ConeSolution, optional
        Where solvers that can be warm-started begin.
    workers : int
        How many programs are solved at a time, in threads.
    **keywords
        As in :func:`~invlayer_core.root`, except for ``event_dims``, ``batch``, ``executor``, ``timeout`` and
        ``compile``. ``polish`` is ``"auto"`` by default, and ``rtol`` 0: solvers that find a program
        infeasible or unbounded may return large numbers, to which no relative tolerance should be granted.

    Returns
    -------
    ConeSolution, or ``(ConeSolution, SolveInfo)`` with ``return_info=True``
        x, the dual variable y ∈ K*, and the slack s ∈ K.

    Raises
    ------
    ConvergenceError
        If a program is infeasible or unbounded, or the optimality conditions do not hold at what the solver
        returned, unless ``on_failure`` says otherwise.
    ConditionsError
        If shapes do not fit, or a keyword has no meaning here.

    References
    ----------
    Agrawal, Barratt, Boyd, Busseti & Moursi 2019, Differentiating through a cone program.
    """
    arguments = (P, q, A, b, structure, solver, options or {}, start, workers, keywords)
    if torch.compiler.is_compiling():
        return outside_graph(_cone_program, *arguments)
    return _cone_program(*arguments)


def _cone_program(
    P: Tensor,
    q: Tensor,
    A: Tensor,
    b: Tensor,
    structure: ConeStructure,
    solver: str | Solver,
    options: Mapping[str, Any],
    start: ConeSolution | None,
    workers: int,
    keywords: CommonKeywords,
) -> Any:
    settings = read_settings({"polish": "auto", "rtol": 0.0, **keywords})
    _check(structure, {"P": P, "q": q, "A": A, "b": b}, keywords)
    instance, name, _ = find_solver(solver, "cone")
    tensors = tuple(_in_double(tensor) for tensor in (P, q, A, b))
    forward = ConeForward(name, instance, structure, dict(options), workers, settings.progress)
    given = tensors if start is None else (*tensors, torch.cat([*start], -1).to(tensors[1]))
    if has_active_set(settings, forward):
        found, info = solve_on_active_set(forward, given, settings)
    else:
        found, info = _solve_in_general(forward, tensors, given, settings)
    found = ConeSolution(*(part.to(q.dtype) for part in found))
    return (found, info) if settings.return_info else found


def _solve_in_general(
    forward: ConeForward, tensors: tuple[Tensor, ...], given: tuple[Tensor, ...], settings: Settings
) -> tuple[ConeSolution, SolveInfo | None]:
    conditions = ConeConditions(forward.structure)
    solution = solve_implicitly(
        conditions, Arguments.flatten(tensors), forward, given, settings,
        captured=(), jacobian=ConeJacobian(forward.structure),
    )  # fmt: skip
    return conditions.solution(solution.y), solution.info


def _in_double(tensor: Tensor) -> Tensor:
    with outside_inference_mode():  # a tensor of inference mode can take part in no derivative
        return (tensor.clone() if tensor.is_inference() else tensor).to(torch.float64)


def _check(structure: ConeStructure, tensors: Mapping[str, Tensor], keywords: CommonKeywords) -> None:
    unused = sorted({"event_dims", "batch", "executor", "timeout", "compile"} & set(keywords))
    if unused:
        raise ConditionsError(f"cone_program: {unused[0]}= has no meaning here; leave it out.")
    sizes = {"q": structure.size, "b": structure.equations}
    sizes |= {"P": structure.P[0].numel(), "A": structure.A[0].numel()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ConditionsError(f"cone_program: {name} is {tensor!r}; accepted is a real tensor.")
        if tensor.ndim == 0 or tensor.shape[-1] != sizes[name]:
            raise ConditionsError(
                f"cone_program: {name} has shape {tuple(tensor.shape)}; accepted is (*batch, {sizes[name]}) "
                f"or ({sizes[name]},) for {structure}."
            )
