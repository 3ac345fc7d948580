"""What cannot be a layer, or not a good one, and how to say so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import cvxpy as cp
from cvxpy.utilities.scopes import quad_form_dpp_scope

import invlayer_core as inv

__all__ = ["PiecewiseConstantWarning", "check_problem", "warn_of_linear_program"]


class PiecewiseConstantWarning(UserWarning):
    """The solution of a linear program is piecewise constant in its costs: the gradient is zero, or none."""


def check_problem(problem: Any, *, gp: bool) -> None:
    """Refuse what has no canonical form that is affine in the parameters.

    Raises
    ------
    ConditionsError
        Naming the expression at fault.
    """
    if not isinstance(problem, cp.Problem):
        raise inv.ConditionsError(
            f"CvxpyLayer(problem={problem!r}): accepted is a cvxpy.Problem, such as "
            "cp.Problem(cp.Minimize(...), constraints)."
        )
    integers = [v.name() for v in problem.variables() if v.attributes["boolean"] or v.attributes["integer"]]
    if integers or problem.is_mixed_integer():
        raise inv.ConditionsError(
            f"CvxpyLayer: the variables {', '.join(integers)} are integer: the solution is piecewise "
            "constant in the parameters, and no optimality condition defines a derivative. Accepted are "
            "continuous variables; or solve with CVXPY inside inv.implicit_function and take "
            "adjoint=DLM(resolve=True), whose perturbed second solve gives a useful surrogate gradient."
        )
    if any(v.is_complex() for v in (*problem.variables(), *problem.parameters())):
        raise inv.ConditionsError(
            "CvxpyLayer: a variable or parameter is complex; accepted are real ones. Use two for the "
            "real and the imaginary part."
        )
    _check_rules(problem, gp)


def _check_rules(problem: cp.Problem, gp: bool) -> None:
    kind = "DGP" if gp else "DCP"
    context = "dgp" if gp else "dcp"
    if not (problem.is_dgp() if gp else problem.is_dcp()):
        with_gp = "" if gp or not problem.is_dgp() else " It is a geometric program: pass gp=True."
        raise inv.ConditionsError(
            f"CvxpyLayer: the problem is not {kind}: {_culprit(problem, context, dpp=False)}.{with_gp} "
            f"Accepted is a problem with problem.is_{context}(); see https://www.cvxpy.org/tutorial/{context}."
        )
    with quad_form_dpp_scope():
        if problem.is_dpp(context, quad_form_dpp=None if gp else "qp"):
            return
        culprit = _culprit(problem, context, dpp=True)
    raise inv.ConditionsError(
        f"CvxpyLayer: the problem is not DPP: {culprit}. Parameters must enter affinely, so that one sparse "
        "map gives the problem's data. Give the product or function of parameters as a parameter of its own, "
        "computed in torch before the layer; see https://www.cvxpy.org/tutorial/dpp."
    )


def _culprit(problem: cp.Problem, context: str, *, dpp: bool) -> str:
    """The smallest part of the problem that breaks the rules while all of its own parts keep them."""
    for top in _tops(problem):
        if not _keeps(top, context, dpp):
            part = top
            while (inner := next((a for a in part.args if not _keeps(a, context, dpp)), None)) is not None:
                part = inner
            return f"{part} does not keep the rules"
    return "the sense of an inequality, or of the objective, is wrong"


def _tops(problem: cp.Problem) -> Iterator[Any]:
    yield problem.objective
    yield from problem.constraints


def _keeps(part: Any, context: str, dpp: bool) -> bool:
    check = getattr(part, f"is_{context}")
    try:
        return cast(bool, check(dpp=True)) if dpp else cast(bool, check())
    except TypeError:
        return cast(bool, check())


def warn_of_linear_program() -> None:
    """Say that gradients by costs are zero or undefined."""
    warnings.warn(
        "CvxpyLayer: this is a linear program. Its solution is piecewise constant in the coefficients of "
        "the objective: their gradient is zero, and where the solution is not unique there is none (a "
        "singular Jacobian, which raises unless adjoint=Implicit(singular=...) decides). For "
        "decision-focused learning add a small quadratic or entropic term to the objective.",
        PiecewiseConstantWarning,
        stacklevel=4,
    )
