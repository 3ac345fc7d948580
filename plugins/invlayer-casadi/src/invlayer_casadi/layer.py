"""CasADi's solvers as ``nn.Module`` layers."""

from __future__ import annotations

from typing import Any, Protocol, Self, Unpack, final

import casadi as ca
from torch import nn

from invlayer_casadi.expressions.expression import Backend
from invlayer_casadi.rootfinding.problem import RootfinderProblem
from invlayer_core.call import CommonKeywords

__all__ = ["CasadiLayer"]


class _LayerProblem(Protocol):
    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Solve for one batch."""


@final
class CasadiLayer(nn.Module):
    """A CasADi solver as a layer whose outputs are differentiable by its inputs."""

    problem: _LayerProblem

    @classmethod
    def _of(cls, problem: _LayerProblem) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.problem = problem
        return layer

    @classmethod
    def from_rootfinder(
        cls,
        function: ca.Function,
        *,
        threads: int = 1,
        backend: Backend = "auto",
        **keywords: Unpack[CommonKeywords],
    ) -> Self:
        """``layer(*parameters, x0=...)`` is the root that a ``casadi.rootfinder`` Function finds.

        CasADi solves, sample by sample; the root is certified by the Function's own conditions, which also
        give the derivatives, to any order.

        Parameters
        ----------
        function : casadi.Function
            Made by ``casadi.rootfinder``, of any plugin.
        threads : int
            How many samples are solved at a time.
        backend : {"auto", "casadi", "torch"}
            Who evaluates the conditions; see :class:`CasadiFunction`.
        **keywords
            ``on_failure, atol, rtol, polish, adjoint, return_info``, as in :func:`invlayer_core.root`.

        Returns
        -------
        CasadiLayer
            Its call takes the Function's inputs in their order, without the guess, which is ``x0=`` (zeros by
            default, and no gradient flows to it). The result is the root, or a tuple of all outputs where the
            Function has others; the others are differentiable, too.

        Examples
        --------
        >>> import casadi as ca, torch
        >>> x, p = ca.SX.sym("x"), ca.SX.sym("p")
        >>> layer = CasadiLayer.from_rootfinder(ca.rootfinder("f", "newton", {"x": x, "p": p, "g": x**2 - p}))
        >>> p = torch.tensor([[4.0], [9.0]], dtype=torch.float64, requires_grad=True)
        >>> x = layer(p, x0=torch.ones(1, dtype=torch.float64))
        >>> x.sum().backward()
        >>> p.grad
        tensor([[0.2500],
                [0.1667]], dtype=torch.float64)
        """
        return cls._of(RootfinderProblem(function, threads, backend, dict(keywords)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.problem.solve(*args, **kwargs)
