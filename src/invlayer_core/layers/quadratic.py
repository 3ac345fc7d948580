"""Quadratic programs as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor

from invlayer_core.call import CommonKeywords
from invlayer_core.functional.quadratic import qp
from invlayer_core.solvers.contract import Solver

__all__ = ["QPLayer"]


@final
class QPLayer(torch.nn.Module):
    """``layer(P, q, G, h, A, b, lb, ub)`` solves a quadratic program; see :func:`invlayer_core.qp`.

    Parameters
    ----------
    solver, options, return_multipliers, **keywords
        As in :func:`invlayer_core.qp`.

    Examples
    --------
    >>> import torch, invlayer_core as inv
    >>> layer = inv.QPLayer(solver="torch.qp")
    >>> layer(torch.eye(2), torch.tensor([-1.0, -3.0]), ub=torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(
        self,
        *,
        solver: str | Solver = "qpsolvers.clarabel",
        options: Mapping[str, Any] | None = None,
        return_multipliers: bool = False,
        **keywords: Unpack[CommonKeywords],
    ) -> None:
        super().__init__()
        self.solver, self.options, self.keywords = solver, options, keywords
        self.return_multipliers = return_multipliers

    def forward(
        self,
        P: Tensor | None,
        q: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        *,
        x0: Tensor | None = None,
    ) -> Any:
        return qp(
            P, q, G, h, A, b, lb, ub, x0=x0, solver=self.solver, options=self.options,
            return_multipliers=self.return_multipliers, **self.keywords,
        )  # fmt: skip
