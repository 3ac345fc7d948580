"""Cone programs that are quadratic programs, by the active set that those have.

Their Jacobian [[P, AᵀD], [A, D − I]] has D = 0 or 1: what is left of it is the symmetric system of the
active constraints, which is smaller, and which Cholesky factors solve (``adjoints/active_set.py``). The same
factors serve the polish.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from invlayer_core.adjoints.active_set import ActiveSet
from invlayer_core.adjoints.implicit import Implicit
from invlayer_core.certificate import SolveInfo
from invlayer_core.conditions.cone import ConeSolution
from invlayer_core.conditions.polyhedral import PolyhedralForm
from invlayer_core.conditions.quadratic import QuadraticConditions
from invlayer_core.execution.cone import ConeForward, PolyhedralForward
from invlayer_core.implicit import Settings, solve_implicitly
from invlayer_core.linear.saddle_point.bank import SaddleBank
from invlayer_core.quadratic.active_set import PolishedForward
from invlayer_core.structure import Arguments

__all__ = ["has_active_set", "solve_on_active_set"]


def has_active_set(settings: Settings, forward: ConeForward) -> bool:
    """Whether a cone program is a quadratic one, and nothing else has been asked for."""
    adjoint = settings.adjoint
    if not forward.structure.cones.is_polyhedral or not isinstance(adjoint, Implicit):
        return False
    return adjoint.linear_solver == "auto" and adjoint.singular != "damped"


def solve_on_active_set(
    forward: ConeForward, given: tuple[Tensor, ...], settings: Settings
) -> tuple[ConeSolution, SolveInfo | None]:
    """Solve, certify and polish on the active constraints, attach.

    Parameters
    ----------
    forward : ConeForward
    given : tuple of Tensor
        P, q, A and b, and perhaps a point to start from.
    settings : Settings
    """
    assert isinstance(settings.adjoint, Implicit)
    form = PolyhedralForm(forward.structure)
    theta = form.arguments(*given[:4])
    bank = SaddleBank()
    found = solve_implicitly(
        QuadraticConditions(form.layout, relative=False),
        Arguments.flatten(theta),
        PolishedForward(PolyhedralForward(forward, form), form.layout, settings.polish, bank, exact=0.0),
        (*theta, *given),
        replace(settings, adjoint=ActiveSet(settings.adjoint, bank), polish=0),
        captured=(),
    )
    return form.solution(found.y, theta, found.dead), _with_polish(found.info)


def _with_polish(info: SolveInfo | None) -> SolveInfo | None:
    """Its steps are the systems of the polish."""
    if info is None:
        return None
    systems = [aux["systems"] for aux in info.aux]
    return replace(info, polish=torch.tensor(systems, dtype=torch.int64).reshape(info.ok.shape))
