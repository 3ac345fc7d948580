"""A CVXPY problem as a differentiable layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import cvxpy as cp
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_cvxpy.adjoint import MOST, is_dense_quadratic, sparse_adjoint, with_pattern
from invlayer_cvxpy.canonical import canonicalise
from invlayer_cvxpy.data import ProgramData
from invlayer_cvxpy.parameters import Parameters, check_complete
from invlayer_cvxpy.problems import check_problem, warn_of_linear_program
from invlayer_cvxpy.recovery import outputs
from invlayer_cvxpy.solvers.through_cvxpy import Installed

__all__ = ["CvxpyLayer"]


@final
class CvxpyLayer(torch.nn.Module):
    """``layer(*tensors)`` solves a convex problem for each sample, and differentiates its solution.

    Parameters
    ----------
    problem : cvxpy.Problem
        DPP (https://www.cvxpy.org/tutorial/dpp), or with ``gp=True`` a DPP geometric program. A parametric
        ``quad_form`` in the objective is allowed.
    parameters : sequence of cvxpy.Parameter
        All parameters of the problem, in the order of the layer's arguments.
    variables : sequence
        What the layer returns: variables; dual variables, ``constraint.dual_variables[k]``; or constraints,
        for the first of those. Values and layouts are CVXPY's.
    gp : bool
    solver : str or Solver
        A registered name such as ``"cvxpy.clarabel"``; the name of any solver that CVXPY has installed, such
        as ``"CLARABEL"``; or an instance.
    solver_args : mapping, optional
        The solver's own options, for every call.
    n_jobs : int
        How many samples are solved at a time, in threads.
    adjoint, on_failure, atol, rtol, polish, progress, return_info
        As in :func:`invlayer_core.cone_program`. ``adjoint`` is by default the implicit one with the linear
        solver that suits the size.

    Raises
    ------
    ConditionsError
        If the problem is not DPP (the message names the expression), or has integer or complex variables; if
        parameters or variables do not fit it.

    Examples
    --------
    >>> import cvxpy as cp, torch
    >>> x, c = cp.Variable(2), cp.Parameter(2)
    >>> layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x >= 0]), [c], [x])
    >>> value = torch.tensor([[1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    >>> (solution,) = layer(value)
    >>> torch.autograd.grad(solution.sum(), value)[0]
    tensor([[1., 0.]], dtype=torch.float64)

    References
    ----------
    Agrawal, Amos, Barratt, Boyd, Diamond & Kolter 2019, Differentiable convex optimization layers.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        gp: bool = False,
        *,
        solver: str | inv.Solver = "cvxpy.clarabel",
        solver_args: Mapping[str, Any] | None = None,
        n_jobs: int = 1,
        **keywords: Any,
    ) -> None:
        super().__init__()
        check_problem(problem, gp=gp)
        check_complete(problem, parameters, variables)
        form = canonicalise(problem, gp=gp)
        self.structure = form.structure
        self.parameters_of_problem = Parameters(form, parameters)
        self.outputs = outputs(form, problem, variables)
        self.solver, self.solver_args, self.n_jobs = _named(solver), dict(solver_args or {}), n_jobs
        self._dense = inv.adjoints.Implicit(singular="consistent")
        defaults = {"polish": "auto", "adjoint": sparse_adjoint(self.structure) or self._dense}
        self.keywords = {**defaults, **keywords}
        self.keywords["adjoint"] = with_pattern(self.keywords["adjoint"], self.structure)
        self._has_adjoint = "adjoint" in keywords
        self._is_dense_quadratic = is_dense_quadratic(self.structure)
        self._data = form.data
        self._maps: dict[tuple[bool, ...], ProgramData] = {}
        if form.structure.cones.is_polyhedral and not form.structure.P[0].numel() and not gp:
            warn_of_linear_program()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        *tensors: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: inv.SolveInfo | None = None,
        **named: Tensor,
    ) -> Any:
        """Solve.

        Parameters
        ----------
        *tensors, **named : Tensor of shape ``(*batch, *shape)``, or ``(*shape)`` for all samples
            One per parameter, by position or by the parameter's name.
        solver_args : mapping, optional
            Options for this call, on top of the layer's.
        warm_start : SolveInfo, optional
            That of an earlier call of the same batch shape: solvers that can do so (SCS, OSQP) start there.

        Returns
        -------
        tuple of Tensor, or ``(tuple, SolveInfo)`` with ``return_info=True``
            One ``(*batch, *shape)`` per variable, in the dtype of the parameters.

        Raises
        ------
        ConditionsError
            If tensors do not fit the parameters.
        ConvergenceError
            If a sample is infeasible or unbounded, or misses its tolerance, unless ``on_failure`` says
            otherwise.
        """
        given = self.parameters_of_problem.ordered(tensors, named)
        dtype = given[0].dtype if given else torch.get_default_dtype()
        for tensor in given[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        data = self._canonical([tensor.to(torch.float64) for tensor in given])
        solver, options, workers = self._choice(solver_args or {})
        keywords = {**self.keywords, "adjoint": self._adjoint(data)}
        found = inv.cone_program(
            data["P"], data["q"], data["A"], data["b"], self.structure,
            solver=solver, options=options, workers=workers,
            start=None if warm_start is None else _start(warm_start, self.structure), **keywords,
        )  # fmt: skip
        solution, info = found if self.keywords.get("return_info") else (found, None)
        values = tuple(output(solution).to(dtype) for output in self.outputs)
        return values if info is None else (values, info)

    def _canonical(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """P, q, A and b, each batched only where it depends on a batched parameter."""
        parameters = self.parameters_of_problem
        batched = tuple(bool(batch) for batch in parameters.batches(tensors))
        if batched not in self._maps:
            self._maps[batched] = ProgramData(self._data, parameters, batched)
        blocks = [parameters.block(slot, tensors) for slot in parameters.slots]
        like = tensors[0] if tensors else torch.zeros(0, dtype=torch.float64)
        return self._maps[batched](blocks, like)

    def _adjoint(self, data: Mapping[str, Tensor]) -> inv.adjoints.Adjoint:
        """The user's; else dense factors off the CPU, and for the active sets of quadratic programs."""
        if not self._has_adjoint and (data["q"].device.type != "cpu" or self._fits_dense(data)):
            return self._dense
        adjoint: inv.adjoints.Adjoint = self.keywords["adjoint"]
        return adjoint

    def _fits_dense(self, data: Mapping[str, Tensor]) -> bool:
        count = torch.broadcast_shapes(*(each.shape[:-1] for each in data.values())).numel()
        size = self.structure.size + self.structure.equations
        return self._is_dense_quadratic and count * size**2 <= MOST

    def _choice(self, solver_args: Mapping[str, Any]) -> tuple[str | inv.Solver, dict[str, Any], int]:
        options = {**self.solver_args, **solver_args}
        solver = _named(options.pop("solve_method", self.solver))  # cvxpylayers' name for it
        workers = options.pop("n_jobs_forward", self.n_jobs)
        return solver, options, max(1, int(workers))


def _named(solver: str | inv.Solver) -> str | inv.Solver:
    """CVXPY's own names, such as "SCS", as registered ones, or else through CVXPY."""
    if not isinstance(solver, str) or "." in solver:
        return solver
    name = f"cvxpy.{solver.lower()}"
    known = any(listing.name == name for listing in inv.solvers("cone"))
    return Installed(solver.upper()) if not known and solver.upper() in cp.installed_solvers() else name


def _start(info: inv.SolveInfo, structure: inv.ConeStructure) -> inv.ConeSolution:
    """Where an earlier call ended, before polishing."""
    found = [each.get("z") if isinstance(each, Mapping) else None for each in info.aux]
    if len(found) != info.ok.numel() or any(z is None for z in found):
        raise inv.ConditionsError(
            "CvxpyLayer(...)(warm_start=...): accepted is the SolveInfo of an earlier call of a CvxpyLayer "
            "of the same problem, made with return_info=True."
        )
    rows = torch.stack([torch.as_tensor(z) for z in found]).reshape(*info.ok.shape, -1)
    x, v = rows.split([structure.size, structure.equations], -1)
    y = structure.cones.project_dual(v)
    return inv.ConeSolution(x, y, y - v)
