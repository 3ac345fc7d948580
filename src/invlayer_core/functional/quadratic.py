"""Quadratic programs as a function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.adjoints.active_set import ActiveSet
from invlayer_core.adjoints.adjoint import Adjoint
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.call import CommonKeywords, find_solver, read_settings
from invlayer_core.compiled.tracing import outside_graph
from invlayer_core.conditions.kkt import Multipliers
from invlayer_core.conditions.quadratic import ARGUMENTS, QuadraticConditions, QuadraticLayout
from invlayer_core.errors import ConditionsError, DegeneracyWarning, warn_user
from invlayer_core.execution.plan import check_batched
from invlayer_core.execution.quadratic import QuadraticForward
from invlayer_core.implicit import Settings, Solution, solve_implicitly
from invlayer_core.linear.saddle_point.bank import SaddleBank
from invlayer_core.linear.sparse_lu import SparseLU
from invlayer_core.quadratic.active_set import PolishedForward
from invlayer_core.quadratic.arguments import read_program
from invlayer_core.quadratic.description import describe_active_set
from invlayer_core.quadratic.short_way import Once, is_plain, solve_plainly
from invlayer_core.solvers.contract import Solver
from invlayer_core.structure import Arguments

__all__ = ["qp"]


def qp(
    P: Tensor | None,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    lb: Tensor | None = None,
    ub: Tensor | None = None,
    *,
    solver: str | Solver = "qpsolvers.clarabel",
    options: Mapping[str, Any] | None = None,
    x0: Tensor | None = None,
    return_multipliers: bool = False,
    **keywords: Unpack[CommonKeywords],
) -> Any:
    """Minimise ½ xᵀPx + qᵀx subject to G x ≤ h, A x = b and lb ≤ x ≤ ub, differentiably in every argument.

    The active set is certified whatever the solver's accuracy, and x and its multipliers are polished on it.
    Derivatives are those of the active set (Amos & Kolter, OptNet, ICML 2017).

    Parameters
    ----------
    P : Tensor of shape ``(*batch, n, n)`` or None
        Positive semidefinite; of one that is not symmetric, ½ (P + Pᵀ) is meant. None for a linear program.
    q : Tensor of shape ``(*batch, n)``
    G, h : Tensors of shape ``(*batch, m, n)`` and ``(*batch, m)``, optional
    A, b : Tensors of shape ``(*batch, k, n)`` and ``(*batch, k)``, optional
    lb, ub : Tensors of shape ``(*batch, n)``, optional
        Infinite where a variable has no bound.
    solver : str or Solver
        A registered name (``inv.solvers("qp")`` lists them), or a ``Solver`` of quadratic programs.
    options : mapping, optional
        The solver's own options, unchanged.
    x0 : Tensor of shape ``(*batch, n)``, optional
        Where the solver starts, if it makes use of that. No gradient flows to it.
    return_multipliers : bool
        Return ``(x, Multipliers)``; they are differentiable, too.
    **keywords
        ``on_failure, atol, rtol, polish, adjoint, batch, timeout, progress, return_info``: see ``Settings``.
        Residuals, and so ``atol``, are relative: see
        :class:`~invlayer_core.conditions.quadratic.QuadraticConditions`. ``polish`` is how many linear
        systems certifying may take for a sample; ``"auto"``, up to 30, by default. With
        ``adjoint=Implicit(singular=...)`` a sample whose derivative is not unique is answered otherwise than
        by the default, ``"consistent"``.

    Returns
    -------
    x, or ``(x, Multipliers)``
        Tensors ``(*batch, n)``. With ``return_info=True`` a pair of that and ``SolveInfo``, whose
        ``constraints`` tells which constraints are active and which only weakly so, and whose ``aux`` says of
        every sample whether its active set is ``"ambiguous"``.

    Raises
    ------
    ConditionsError
        If shapes, dtypes or devices do not fit.
    ConvergenceError
        If a program is infeasible, unbounded or not convex, or the solver misses its solution, unless
        ``on_failure`` says otherwise.
    SingularJacobianError
        In the backward pass, if x, or multipliers that were asked for, are not a differentiable function of
        the args.

    Warns
    -----
    DegeneracyWarning
        If derivatives can be taken, and an active set is ambiguous: a constraint is active with a multiplier
        of zero (x has one-sided derivatives; the one given leaves it inactive), x is not unique, or no set
        could be proved. Also for linear programs, whose x is a piecewise constant function of q.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> q = torch.tensor([-0.5, -3.0], dtype=torch.float64, requires_grad=True)
    >>> eye, one = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    >>> inv.qp(eye, q, ub=one, solver="torch.qp").sum().backward()
    >>> bool((q.grad - torch.tensor([-1.0, 0.0])).abs().max() < 1e-12)
    True
    """
    given = (P, q, G, h, A, b, lb, ub)
    if torch.compiler.is_compiling():
        return outside_graph(_qp, given, solver, options, x0, return_multipliers, keywords)
    return _qp(given, solver, options, x0, return_multipliers, keywords)


def _qp(
    given: tuple[Tensor | None, ...],
    solver: str | Solver,
    options: Mapping[str, Any] | None,
    x0: Tensor | None,
    return_multipliers: bool,
    keywords: CommonKeywords,
) -> Any:
    layout, theta, restore = read_program(dict(zip(ARGUMENTS, given, strict=True)))
    instance, name, thread_safe = find_solver(solver, "qp")
    if not keywords and x0 is None and not instance.batched and is_plain(layout, theta):
        instance = Once(instance)
        plain = solve_plainly(layout, theta, instance, options or {}, return_multipliers)
        if plain is not None:
            x, *multipliers = map(restore, plain)
            return (x, Multipliers(*multipliers)) if return_multipliers else x
    settings = _settings(keywords)
    batch = layout.program(theta).batch()
    if instance.batched:
        check_batched(name, settings.batch, settings.limits)
    else:
        _check_way(settings)
    adjoint = _active_set(settings)
    rounds, settings = settings.polish, replace(settings, adjoint=adjoint, polish=0)
    bank = adjoint.bank if isinstance(adjoint, ActiveSet) and _keeps_factors(theta) else None
    forward = PolishedForward(
        QuadraticForward(
            name, instance, layout, batch, settings.batch, thread_safe, settings.limits, dict(options or {})
        ),
        layout,
        rounds,
        bank,
    )
    guess = () if x0 is None else (x0.detach().to(theta[0]),)
    solution = solve_implicitly(
        QuadraticConditions(layout),
        Arguments.flatten(theta),
        forward,
        (*theta, *guess),
        settings,
        captured=(),
    )
    if solution.y.requires_grad or _functorch.is_active():
        _warn_of_degeneracy(layout, theta, solution)
    x, *multipliers = restore(solution.y).split(layout.sections, -1)
    answer = (x, Multipliers(*multipliers)) if return_multipliers else x
    if not settings.return_info:
        return answer
    assert solution.info is not None
    constraints = describe_active_set(
        layout, [_functorch.plain(t) for t in theta], _functorch.plain(solution.y)
    )
    return answer, replace(solution.info, constraints=constraints)


def _warn_of_degeneracy(layout: QuadraticLayout, theta: tuple[Tensor, ...], solution: Solution) -> None:
    """Say which derivatives are one-sided, or zero almost everywhere."""
    fine = None if solution.info is None else solution.info.ok.reshape(-1).tolist()
    doubtful = [
        i for i, aux in enumerate(solution.outcome.aux) if aux.get("ambiguous") and (fine is None or fine[i])
    ]
    if doubtful:
        warn_user(
            f"qp: the active set of {len(doubtful)} of {len(solution.outcome.aux)} samples is ambiguous (the "
            f"first is sample {doubtful[0]}): a constraint is active with a multiplier of zero, x is "
            "not unique, or no set could be proved. The derivative is the one-sided one that leaves weakly "
            "active constraints out; info.constraints tells which they are.",
            DegeneracyWarning,
        )
    if "P" not in layout.names and theta[layout.names.index("q")].requires_grad:
        warn_user(
            "qp with P=None is a linear program: x is a piecewise constant function of q, and the "
            "gradient for q is zero almost everywhere. Accepted, if it is to tell anything, is a strictly "
            "convex P, such as a small multiple of the identity; q.detach() says that zero is meant.",
            DegeneracyWarning,
        )


def _settings(keywords: CommonKeywords) -> Settings:
    if keywords.get("event_dims", 1) != 1:
        raise ConditionsError(
            f"qp(event_dims={keywords['event_dims']!r}): the last dim of x is one program's variables; leave "
            "event_dims out."
        )
    for name in ("n_starts", "warm_start", "compile"):
        if name in keywords:
            raise ConditionsError(
                f"qp({name}=...): a convex program has one solution wherever its solver starts, and its "
                f"derivative evaluates no F that could be compiled. Leave {name} out; x0= is where a solver "
                "that makes use of it starts."
            )
    keywords = {"polish": "auto", "adjoint": Implicit(singular="consistent"), **keywords}
    return read_settings(keywords)


def _active_set(settings: Settings) -> Adjoint:
    """The adjoint on the active set, as the user has set it; a dense method asks for the general rule."""
    chosen = settings.adjoint
    if not isinstance(chosen, Implicit):
        raise ConditionsError(
            f"qp(adjoint={chosen!r}): accepted is inv.adjoints.Implicit(...). Other adjoints go with "
            "inv.nlp, or with a solver function of your own by inv.implicit_function."
        )
    if chosen.singular == "damped":
        raise ConditionsError(
            "qp(adjoint=Implicit(singular='damped')): accepted are 'consistent', 'raise', 'lstsq', 'nan' and "
            "'zero'."
        )
    if isinstance(chosen.linear_solver, SparseLU):
        return ActiveSet(chosen, SaddleBank(chosen.linear_solver.direct_solver))
    return ActiveSet(chosen, SaddleBank()) if chosen.linear_solver == "auto" else chosen


def _check_way(settings: Settings) -> None:
    """Refuse the ways of a batch that programs, handed over as a whole, do not go."""
    if settings.batch in ("lockstep", "stacked"):
        raise ConditionsError(
            f"qp(batch={settings.batch!r}): a quadratic program goes to its solver as a whole, and not by "
            "calls of F. Accepted are 'auto', 'serial', 'threads' and 'processes'; or solver='torch.qp', "
            "which takes the batch."
        )
    if settings.timeout is not None:
        raise ConditionsError(
            f"qp(timeout={settings.timeout!r}): a quadratic program goes to its solver as a whole, and "
            "cannot be stopped in between. Leave timeout out; solvers have a time limit among their options."
        )


def _keeps_factors(theta: tuple[Tensor, ...]) -> bool:
    """Whether a derivative by torch's tape is to be expected, which can use the factors of the polish."""
    return torch.is_grad_enabled() and not _functorch.is_active() and any(t.requires_grad for t in theta)
