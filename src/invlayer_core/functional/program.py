"""Constrained minimisation as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast, final

import torch
from torch import Tensor

from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.call import CommonKeywords, SolverLike, open_arguments, read_settings
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.kkt import Activity, Multipliers, Program
from invlayer_core.constraints import ConstraintsAt
from invlayer_core.errors import ConditionsError
from invlayer_core.functional.posed_program import PosedProgram
from invlayer_core.functional.unknowns import Unknowns
from invlayer_core.implicit import Settings, Solution
from invlayer_core.inputs import check_devices, working_precision
from invlayer_core.starts import Starts, previous_solution

__all__ = ["nlp"]


def nlp(
    objective: Callable[..., Tensor],
    y0: Any,
    args: Any = (),
    *,
    eq: Callable[..., Any] | None = None,
    ineq: Callable[..., Any] | None = None,
    bounds: tuple[Any, Any] | None = None,
    solver: SolverLike = "scipy.minimize",
    options: Mapping[str, Any] | None = None,
    activity: Activity = "exact",
    return_multipliers: bool = False,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Find a local minimum of ``objective`` under constraints, and differentiate it with its multipliers.

    minimise ``objective(y, *args)`` such that ``eq(y, *args)`` = 0, ``ineq(y, *args)`` ≥ 0 and lower ≤ y ≤
    upper; any of them may be left out. The conditions are those of Karush, Kuhn and Tucker, with the active
    set by a primal–dual test: see :class:`~invlayer_core.conditions.kkt.KKTConditions`.

    Parameters
    ----------
    objective : callable
        ``(y, *args) -> (*batch,)`` in torch, twice differentiable.
    y0, args
        As in :func:`invlayer_core.minimize`. With ``n_starts=k`` y0 holds k guesses, ``(k, *batch, n)``, and
        of the points that satisfy the conditions, each after its polish, the one of least objective is taken.
    eq, ineq : callable, optional
        ``(y, *args) -> (*batch, k)`` in torch, or a pytree of such.
    bounds : (lower, upper), optional
        Tensors or numbers that broadcast to y (pytrees like y0, where that is one), with gradients; None or
        ∞ where there is no bound.
    solver : str, Solver or callable
        A registered name for the kind ``"nlp"``, or any function ``solver(y0, *args) -> y``. Multipliers are
        found beside y, where the solver does not give them.
    options : mapping, optional
        The solver's own options.
    activity : {"exact", "soft", "full"}
        How inequalities enter the derivative: as their active set; smoothed, as the barrier problem that an
        interior-point method stopped at has them; or as complementarity products.
    return_multipliers : bool
        Return ``(y, Multipliers)``; both are differentiable.
    **keywords
        As in :func:`invlayer_core.root`, with the defaults ``polish="auto"`` and
        ``adjoint=Implicit(singular="consistent")``: primal–dual Newton steps settle the active set after any
        solver, and dependent constraints keep the derivative of y, which they leave defined.

    Returns
    -------
    y like y0, or ``(y, Multipliers)``; with ``return_info=True`` a pair of that and ``SolveInfo``, whose
    ``constraints`` tell the active set, what is weakly active, and whether gradients are independent (LICQ)

    Warns
    -----
    DegeneracyWarning
        If a constraint is weakly active, so that y has only one-sided derivatives.

    Raises
    ------
    SingularJacobianError
        At the derivative, where it is not defined: no second-order sufficiency, or multipliers asked for that
        dependent constraints leave open.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> p = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    >>> nearest = lambda y0, p: torch.tensor([1.0, 0.0], dtype=torch.float64)  # in the unit simplex
    >>> y, multipliers = inv.nlp(
    ...     lambda y, p: (y - p).square().sum(-1) / 2, torch.zeros(2, dtype=torch.float64), p,
    ...     eq=lambda y, p: y.sum(-1, keepdim=True) - 1, bounds=(0.0, None), solver=nearest,
    ...     return_multipliers=True,
    ... )
    >>> bool((multipliers.equalities + 1).abs() < 1e-12), bool((multipliers.lower[1] - 0.5).abs() < 1e-12)
    (True, True)
    """
    stated = (objective, eq, ineq, bounds, activity, return_multipliers)
    if torch.compiler.is_compiling():
        return outside_graph(_nlp, stated, y0, args, solver, options, keywords)
    return _nlp(stated, y0, args, solver, options, keywords)


def _nlp(stated: tuple[Any, ...], *call: Any) -> Any:
    return _Constraints(*stated).solve(*call)


@final
@dataclass(frozen=True)
class _Constraints:
    """A problem as the user states it."""

    objective: Callable[..., Tensor]
    eq: Callable[..., Any] | None
    ineq: Callable[..., Any] | None
    bounds: tuple[Any, Any] | None
    activity: Activity
    return_multipliers: bool

    def solve(
        self,
        y0: Any,
        args: Any,
        solver: SolverLike,
        options: Mapping[str, Any] | None,
        keywords: CommonKeywords,
    ) -> Any:
        unknowns = Unknowns.of("nlp", y0, args, keywords)
        settings = _settings(unknowns.keywords("nlp", self._without_multipliers(keywords)))
        starts = Starts.of("nlp", working_precision(unknowns.vector).detach(), settings)
        start = starts.first
        lower, upper = (_bound(name, bound, unknowns, start) for name, bound in self._pair())
        arguments, _ = open_arguments((*(args if isinstance(args, tuple) else (args,)), lower, upper))
        check_devices("nlp", start, arguments.tensors)
        program = Program(
            unknowns.function(self.objective),
            None if self.eq is None else unknowns.packed(self.eq),
            None if self.ineq is None else unknowns.packed(self.ineq),
            lower is not None,
            upper is not None,
        )
        problem = PosedProgram(program, arguments, starts, settings, self._checked_activity())
        solution = problem.solve(unknowns.solver(solver), options)
        return self._result(solution, problem, unknowns, unknowns.vector.dtype)

    def _without_multipliers(self, keywords: CommonKeywords) -> CommonKeywords:
        """The keywords, with y alone of ``warm_start=((y, multipliers), info)``."""
        if "manifold" in keywords:
            raise _no_manifold()
        if not self.return_multipliers or keywords.get("warm_start") is None:
            return keywords
        answer, info = previous_solution("nlp", keywords["warm_start"])
        y = answer[0] if type(answer) is tuple and len(answer) == 2 else answer
        return cast(CommonKeywords, {**keywords, "warm_start": (y, info)})

    def _pair(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        bounds = (None, None) if self.bounds is None else self.bounds
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise ConditionsError(
                f"nlp(bounds={bounds!r}): accepted is a pair (lower, upper) of tensors, numbers or None."
            )
        return ("lower", bounds[0]), ("upper", bounds[1])

    def _checked_activity(self) -> Activity:
        if self.activity not in ("exact", "soft", "full"):
            raise ConditionsError(
                f"nlp(activity={self.activity!r}): accepted are 'exact', 'soft' and 'full'."
            )
        return self.activity

    def _result(
        self, solution: Solution, problem: PosedProgram, unknowns: Unknowns, dtype: torch.dtype
    ) -> Any:
        y, multipliers = problem.layout.split(solution.y)
        constraints = ConstraintsAt(problem.conditions, solution.y, problem.arguments)
        constraints.warn_of_degeneracy()
        y = unknowns.restore(y.to(dtype))
        answer = (y, self._of_user(multipliers, unknowns, dtype)) if self.return_multipliers else y
        if not problem.settings.return_info:
            return answer
        assert solution.info is not None
        return answer, replace(solution.info, constraints=constraints.describe())

    @staticmethod
    def _of_user(multipliers: Multipliers, unknowns: Unknowns, dtype: torch.dtype) -> Multipliers:
        """Those of bounds in the structure of y0."""
        equalities, inequalities, lower, upper = (multiplier.to(dtype) for multiplier in multipliers)
        below = unknowns.unpack(lower) if lower.shape[-1] else lower
        above = unknowns.unpack(upper) if upper.shape[-1] else upper
        return Multipliers(equalities, inequalities, below, above)


def _no_manifold() -> ConditionsError:
    return ConditionsError(
        "nlp(manifold=...): the unknowns of a constrained problem are vectors. Accepted is manifold= of "
        "minimize and least_squares, without constraints; or state the manifold as one of them, such as "
        "eq=lambda q: q.square().sum(-1, keepdim=True) - 1 for a unit vector; or make y coordinates, and "
        "points of them within the objective."
    )


def _settings(keywords: CommonKeywords) -> Settings:
    defaults: dict[str, Any] = {"polish": "auto", "adjoint": Implicit(singular="consistent")}
    return read_settings(cast(CommonKeywords, {**defaults, **keywords}))


def _bound(name: str, bound: Any, unknowns: Unknowns, start: Tensor) -> Tensor | None:
    """A bound as a tensor that broadcasts to the vector of unknowns, or None."""
    if bound is None:
        return None
    if unknowns.structure is not None and not isinstance(bound, (int, float)):
        return unknowns.structure.pack("nlp", bound)
    if not isinstance(bound, Tensor):
        bound = torch.as_tensor(bound, dtype=start.dtype, device=start.device)
    try:
        fits = torch.broadcast_shapes(bound.shape, start.shape) == start.shape
    except RuntimeError:
        fits = False
    if not fits or not bound.is_floating_point():
        raise ConditionsError(
            f"nlp: the {name} bound has shape {tuple(bound.shape)} and dtype {bound.dtype}; accepted is a "
            f"floating-point tensor that broadcasts to y of shape {tuple(start.shape)}."
        )
    return bound
