"""Check a Jacobian of residuals that was written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from invlayer_core.call import name_of, open_arguments
from invlayer_core.conditions.charted import Charted, ChartedJacobian
from invlayer_core.conditions.stationarity import HalfSquares, StationarityConditions
from invlayer_core.conditions.system import System
from invlayer_core.errors import ConditionsError
from invlayer_core.functional.unknowns import Packed, Unknowns
from invlayer_core.inputs import working_precision
from invlayer_core.jacobians.verification import given_and_taken, jacobian_errors, wrong_entry
from invlayer_core.leaves import EventDims
from invlayer_core.manifolds.atlas import Atlas
from invlayer_core.structure import SystemShape

__all__ = ["check_jacobian"]


def check_jacobian(
    residuals: Callable[..., Any],
    jacobian: Callable[..., Tensor],
    y: Any,
    args: Any = (),
    *,
    manifold: Any = None,
    event_dims: EventDims = 1,
    rtol: float | None = None,
) -> float:
    """Compare the ``jacobian=`` of :func:`invlayer_core.least_squares` with that of autograd, at one point.

    Take a point that is not special: at zeros a wrong entry may be right by chance.

    Parameters
    ----------
    residuals, jacobian, args, manifold, event_dims
        As there.
    y : Tensor of shape ``(*batch, n)``, or a pytree of tensors
        Where to compare; on a manifold, a point.
    rtol : float, optional
        The error that is accepted, relative to the largest entry of each sample; 1e-6 in float64 and 1e-3 in
        float32.

    Returns
    -------
    float
        The largest relative error of any sample.

    Raises
    ------
    ConditionsError
        If it is above ``rtol``, naming the entry; or if the shape is another.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> residuals = lambda y, t: y[..., :1] * torch.exp(-y[..., 1:] * t)
    >>> def jacobian(y, t):
    ...     decay = torch.exp(-y[..., 1:] * t)
    ...     return torch.stack([decay, -t * y[..., :1] * decay], -1)
    >>> y, t = torch.tensor([2.0, 0.5]), torch.linspace(0, 1, 5)
    >>> inv.check_jacobian(residuals, jacobian, y, t) < 1e-6
    True
    """
    args = args if isinstance(args, tuple) else (args,)
    if manifold is None:
        unknowns = Unknowns.of("check_jacobian", y, args, {"event_dims": event_dims})
        point = working_precision(unknowns.vector).detach()
        objective = HalfSquares(unknowns.packed(residuals), unknowns.function(jacobian))
    else:
        atlas = Atlas.of("check_jacobian", y, manifold, event_dims)
        base = atlas.checked("check_jacobian: y", atlas.structure.pack("check_jacobian", y).detach())
        point, args = atlas.start(base), (base, *args)
        objective = HalfSquares(Packed(Charted(residuals, atlas)), ChartedJacobian(jacobian, atlas))
    arguments, _ = open_arguments(args)
    conditions = StationarityConditions(objective)
    system = System(conditions, arguments, SystemShape.of(point, 1), parts=conditions.parts)
    given, taken = given_and_taken(system, "residuals", "residuals_jacobian", point, arguments.tensors)
    largest = float(jacobian_errors(given, taken).max())
    limit = (1e-6 if point.element_size() > 4 else 1e-3) if rtol is None else rtol
    if not largest <= limit:
        raise ConditionsError(
            f"jacobian {name_of(jacobian)!r} is not the derivative of residuals {name_of(residuals)!r}: "
            f"{wrong_entry(given, taken)}. Accepted are entries within {limit:.0e} of the largest one of "
            "their sample. Leave jacobian out, and autograd takes it."
        )
    return largest
