"""CasADi's solvers as ``nn.Module`` layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, Self, final

import casadi as ca
from torch import nn

from invlayer_casadi.expressions.expression import Backend, OnFailure
from invlayer_casadi.integrator import IntegratorProblem
from invlayer_casadi.nlp.conditions import Activity
from invlayer_casadi.nlp.conic import ConicProblem
from invlayer_casadi.nlp.native_sensitivities import native_options
from invlayer_casadi.nlp.opti import OptiProblem
from invlayer_casadi.nlp.problem import NlpProblem, NlpSettings
from invlayer_casadi.nlp.program import NlpProgram
from invlayer_casadi.nlp.solver_functions import make_nlpsol, make_qpsol
from invlayer_casadi.rootfinding.problem import RootfinderProblem
from invlayer_core import ConditionsError

__all__ = ["CasadiLayer"]


class _LayerProblem(Protocol):
    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Solve for one batch."""


@final
class CasadiLayer(nn.Module):
    """A nonlinear program, solved by CasADi: ``x = layer(p, lbx=..., ubx=..., lbg=..., ubg=...)``.

    The solution is certified by the KKT conditions of the problem, per sample, and differentiated through
    them, to any order, by parameters and by bounds; CasADi gives exact Hessians and Jacobians, whose sparsity
    is used from 60 unknowns and multipliers on. Other solvers: :meth:`from_nlpsol`, :meth:`from_opti`,
    :meth:`from_qp`, :meth:`from_conic`, :meth:`from_rootfinder`, :meth:`from_integrator`.

    Parameters
    ----------
    problem : mapping
        ``{"x": ..., "f": ..., "p": ..., "g": ...}``, as ``casadi.nlpsol`` takes it, in SX or MX.
    solver : str
        A plugin of ``casadi.nlpsol``.
    options : mapping, optional
        The options of ``casadi.nlpsol``. ipopt is silent by default.
    outputs : str or sequence of str
        What a call returns, one tensor or a tuple: of ``"x"``, ``"f"``, ``"g"``, ``"lam_x"``, ``"lam_g"``.
        All are differentiable. Multipliers have CasADi's signs: positive at an upper bound.
    activity : {"exact", "soft"}
        How inequalities enter the derivative: as the active set; or smoothed, as in the barrier problem that
        an interior-point method stopped at.
    threads : int
        How many samples are solved at a time.
    backend : {"auto", "casadi", "torch", "native"}
        Who evaluates the conditions; see :class:`CasadiFunction`. ``"native"`` takes CasADi's own
        sensitivities instead: first and second order, without ``torch.func``, and refused where they would
        be wrong.
    **keywords
        ``on_failure, atol, rtol, polish, adjoint, return_info``, as in :func:`invlayer_core.root`. ``polish``
        is ``"auto"``: Newton steps settle the active set and take the solution to rounding error.

    Notes
    -----
    A call takes ``p`` ``(*batch, np)`` (not where the problem has none) and, by keyword, ``lbx, ubx, lbg,
    ubg``, with gradients, and the guess ``x0, lam_x0, lam_g0``, without: tensors ``(*batch, k)``, or numbers
    for all entries. Batch dims broadcast. As in CasADi, bounds are infinite and guesses zero by default.

    Examples
    --------
    >>> import casadi as ca, torch
    >>> x, p = ca.SX.sym("x", 2), ca.SX.sym("p", 2)
    >>> layer = CasadiLayer({"x": x, "p": p, "f": ca.sumsqr(x - p), "g": ca.sum1(x)})  # onto the simplex
    >>> p = torch.tensor([[0.2, 0.6], [2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    >>> layer(p, lbx=0.0, lbg=1.0, ubg=1.0).detach()
    tensor([[0.3000, 0.7000],
            [1.0000, 0.0000]], dtype=torch.float64)
    """

    problem: _LayerProblem

    def __init__(
        self,
        problem: Mapping[str, Any],
        solver: str = "ipopt",
        options: Mapping[str, Any] | None = None,
        *,
        outputs: str | Sequence[str] = "x",
        activity: Activity = "exact",
        threads: int = 1,
        backend: Backend | Literal["native"] = "auto",
        **keywords: Any,
    ) -> None:
        super().__init__()
        settings = NlpSettings.read(outputs, activity, threads, dict(keywords))
        if backend == "native":
            options = native_options(options)
            settings, backend = replace(settings, min_lam=options["min_lam"]), "auto"
        program = NlpProgram.of(problem, backend)
        self.problem = NlpProblem(program, make_nlpsol(program.oracle, solver, options), settings)

    @classmethod
    def from_nlpsol(
        cls,
        function: ca.Function,
        *,
        outputs: str | Sequence[str] = "x",
        activity: Activity = "exact",
        threads: int = 1,
        backend: Backend = "auto",
        **keywords: Any,
    ) -> Self:
        """The same for a Function made by ``casadi.nlpsol``, as it is.

        Raises
        ------
        ConditionsError
            If it is none.
        """
        if not isinstance(function, ca.Function) or function.is_null() or not function.is_a("Nlpsol"):
            raise ConditionsError(
                f"CasadiLayer.from_nlpsol({function!r}): accepted is a Function made by casadi.nlpsol."
            )
        settings = NlpSettings.read(outputs, activity, threads, dict(keywords))
        return cls._of(NlpProblem(NlpProgram(function.oracle(), backend), function, settings))

    @classmethod
    def from_opti(
        cls,
        opti: ca.Opti,
        parameters: Sequence[Any],
        outputs: Sequence[Any],
        *,
        solver: str | None = None,
        options: Mapping[str, Any] | None = None,
        activity: Activity = "exact",
        threads: int = 1,
        backend: Backend = "auto",
        **keywords: Any,
    ) -> Self:
        """``layer(*parameters)`` solves an Opti stack, and returns expressions of its variables and duals.

        Parameters
        ----------
        opti : casadi.Opti
            With its objective and constraints; later changes of it have no effect on the layer.
        parameters : sequence of MX
            All of the stack's ``opti.parameter()``, in the order in which the layer takes them. A column of r
            rows is a tensor ``(*batch, r)``, a matrix ``(*batch, r, c)``.
        outputs : sequence of MX
            What the layer returns: variables, ``opti.dual(constraint)``, or any expression of them; one
            tensor or a tuple, in the same shapes.
        solver : str, optional
            A plugin of ``casadi.nlpsol``; by default the one chosen by ``opti.solver``, or else ipopt.
        options : mapping, optional
            Of ``casadi.nlpsol``, with ``solver``.
        activity, threads, backend, **keywords
            As for the class.

        Raises
        ------
        ConditionsError
            If a parameter is missing, or an output holds symbols of another stack.

        Examples
        --------
        >>> import casadi as ca, torch
        >>> opti = ca.Opti()
        >>> x, p = opti.variable(2), opti.parameter(2)
        >>> opti.minimize(ca.sumsqr(x - p))
        >>> _ = opti.subject_to(ca.sum1(x) == 1)
        >>> layer = CasadiLayer.from_opti(opti, [p], [x])
        >>> layer(torch.tensor([2.0, 0.0], dtype=torch.float64))
        tensor([ 1.5000, -0.5000], dtype=torch.float64)
        """
        settings = NlpSettings.read("x", activity, threads, dict(keywords))
        return cls._of(OptiProblem.of(opti, parameters, outputs, solver, options, settings, backend))

    @classmethod
    def from_qp(
        cls,
        problem: Mapping[str, Any],
        solver: str = "qrqp",
        options: Mapping[str, Any] | None = None,
        *,
        outputs: str | Sequence[str] = "x",
        threads: int = 1,
        backend: Backend = "auto",
        **keywords: Any,
    ) -> Self:
        """A quadratic program, solved by a plugin of ``casadi.qpsol`` (conic): qrqp, daqp, highs, osqp, ...

        Parameters are those of the class; f is quadratic and g linear in x.
        """
        settings = NlpSettings.read(outputs, "exact", threads, dict(keywords))
        program = NlpProgram.of(problem, backend)
        return cls._of(NlpProblem(program, make_qpsol(program.oracle, solver, options), settings))

    @classmethod
    def from_conic(
        cls, function: ca.Function, *, outputs: str | Sequence[str] = "x", threads: int = 1, **keywords: Any
    ) -> Self:
        """``layer(h, g, a, lba=..., uba=..., lbx=..., ubx=...)`` solves min ½ xᵀHx + gᵀx, lba ≤ A x ≤ uba.

        Parameters
        ----------
        function : casadi.Function
            Made by ``casadi.conic``, for given patterns of H and A.
        outputs : str or sequence of str
            Of ``"x"``, ``"cost"``, ``"lam_x"``, ``"lam_a"``; all differentiable.
        threads, **keywords
            As for the class.

        Returns
        -------
        CasadiLayer
            Of h ``(*batch, n, n)``, symmetric, g ``(*batch, n)`` and a ``(*batch, m, n)``, all with
            gradients; entries outside the patterns are ignored. Bounds and guesses as for the class.
        """
        return cls._of(ConicProblem.of(function, outputs, threads, dict(keywords)))

    @classmethod
    def from_integrator(
        cls, function: ca.Function, *, outputs: str | Sequence[str] = "xf", on_failure: OnFailure = "raise"
    ) -> Self:
        """``layer(x0, p=..., u=..., z0=...)`` integrates an ODE or DAE, with CasADi's own sensitivities.

        Parameters
        ----------
        function : casadi.Function
            Made by ``casadi.integrator``, of any plugin: cvodes, idas, rk, collocation.
        outputs : str or sequence of str
            What a call returns, one tensor or a tuple: of ``"xf"``, ``"zf"``, ``"qf"``. With a grid of times
            they are ``(*batch, n, times)``.
        on_failure : {"raise", "warn", "nan"}
            For a sample whose integration fails: an error, or NaN for that sample alone.

        Returns
        -------
        CasadiLayer
            Of x0 ``(*batch, n)``, and of p, u and z0 where the problem has them; all but the guess z0 with
            gradients, of every order that CasADi gives. They are as accurate as the integrator's tolerances
            let them: see the page on CasADi in the documentation.

        Examples
        --------
        >>> import casadi as ca, torch
        >>> x, p = ca.SX.sym("x"), ca.SX.sym("p")
        >>> options = {"reltol": 1e-10, "abstol": 1e-12}
        >>> layer = CasadiLayer.from_integrator(
        ...     ca.integrator("F", "cvodes", {"x": x, "p": p, "ode": -p * x}, 0.0, 1.0, options)
        ... )
        >>> rate = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
        >>> layer(torch.ones(1, dtype=torch.float64), p=rate).sum().backward()
        >>> bool((rate.grad + torch.exp(-rate)).abs().max() < 1e-8)
        True
        """
        return cls._of(IntegratorProblem.of(function, outputs, on_failure))

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
        **keywords: Any,
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
