"""The adapter under test, with everything a rule needs to run it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor

from invlayer_core.certificate import SolveInfo, default_tolerance
from invlayer_core.errors import SolverLoadError
from invlayer_core.functional import fixed_point, least_squares, minimize, nlp, root
from invlayer_core.solvers import Plugin, Solver, SolverSpec, get_spec
from invlayer_core.solvers.loading import load_solver
from invlayer_core.testing import zoo
from invlayer_core.testing.zoo import Case

__all__ = ["NotApplicable", "Subject"]

_SOLVE: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "root": root,
        "fixed_point": fixed_point,
        "minimize": minimize,
        "least_squares": least_squares,
        "nlp": lambda function, y0, args, **keywords: nlp(
            zoo.HalfNorm(), y0, args, eq=function, **{"polish": 0, **keywords}
        ),
    }
)
_CALLER: Final = Plugin("check_solver() call")


@final
class NotApplicable(Exception):  # noqa: N818 (no error: the rule has nothing to say about this solver)
    """A rule does not concern the solver; the message says why."""


@final
@dataclass(frozen=True)
class Subject:
    """A solver's spec, and how it is to be run.

    Attributes
    ----------
    spec : SolverSpec
        Need not be registered.
    kinds : tuple of str
        The problem kinds to test, all of which the spec declares.
    options : mapping
        Given to every solve.
    tolerance : float
        ``atol`` and ``rtol`` of every solve in float64.
    """

    spec: SolverSpec
    kinds: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-6

    @classmethod
    def of(
        cls,
        spec: SolverSpec | str,
        options: Mapping[str, Any] | None,
        kinds: Collection[str] | None,
        tolerance: float,
    ) -> Subject:
        """Look up the name, and choose the kinds.

        Raises
        ------
        TypeError, ValueError
            If ``spec`` is neither a spec nor a name, or a kind cannot be tested.
        SolverNotFoundError, SolverConflictError
            If no solver of that name is registered, or more than one.
        """
        if isinstance(spec, str):
            spec = get_spec(spec)
        if not isinstance(spec, SolverSpec):
            raise TypeError(
                f"check_solver({spec!r}): accepted are a SolverSpec or the name of a registered solver."
            )
        return cls(spec, _chosen(spec, kinds), dict(options or {}), tolerance)

    @property
    def untested(self) -> tuple[str, ...]:
        """Kinds that the spec declares and that are not tested."""
        return tuple(kind for kind in self.spec.kinds if kind not in self.kinds)

    @cached_property
    def solver(self) -> Solver:
        """The adapter, as batched as its class says it is.

        Raises
        ------
        NotApplicable
            If it cannot be made.
        """
        for batched in (self.spec.batched, not self.spec.batched):
            try:
                return self.load(batched=batched)
            except SolverLoadError:
                continue
        raise NotApplicable("the solver cannot be loaded; see rule 'loading'")

    def load(self, *, batched: bool) -> Solver:
        """A new instance of the adapter, from a spec with this ``batched``.

        Raises
        ------
        SolverLoadError
            As :func:`invlayer_core.get_solver`.
        """
        return load_solver(replace(self.spec, batched=batched), _CALLER)

    def each(self, *cases: Case) -> Iterator[tuple[str, Case]]:
        """Every case as every kind, in the form that the solver takes."""
        return ((kind, self.suited(case)) for kind in self.kinds for case in cases)

    def suited(self, case: Case) -> Case:
        """The case in the form that the solver takes: scalar equations, if it solves only those."""
        return case.scalar() if self.spec.scalar else case

    def options_for(self, case: Case) -> dict[str, Any]:
        """The options of a solve: the given ones, with the bracket of the case where one is needed."""
        return {**self.options, **({"bracket": case.bracket} if self.spec.bracket else {})}

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """``atol`` and ``rtol`` of a solve in that precision."""
        return self.tolerance if dtype == torch.float64 else max(self.tolerance, default_tolerance(dtype))

    def error_bound(self, y: Tensor) -> Tensor:
        """How far from a root of a regular case a certified ``y`` can be, per element."""
        return 10 * self.tolerance_for(y.dtype) * (1 + y.detach().abs())

    def solve(
        self, case: Case, kind: str, *, solver: Solver | None = None, **keywords: Any
    ) -> tuple[Tensor, SolveInfo]:
        """Solve a case through the engine; samples that fail are NaN.

        Parameters
        ----------
        case : Case
        kind : str
        solver : Solver, optional
            Another one than the adapter itself.
        **keywords
            Further ones for :func:`invlayer_core.root`, or others than the usual.

        Returns
        -------
        y : Tensor of shape ``(*batch, n)``
        info : SolveInfo
        """
        tolerance = self.tolerance_for(case.start.dtype)
        settings: dict[str, Any] = {
            "options": self.options_for(case),
            "atol": tolerance,
            "rtol": tolerance,
            "on_failure": "nan",
            "return_info": True,
        }
        y, info = _SOLVE[kind](
            case.posed(kind), case.start, case.args, solver=solver or self.solver, **(settings | keywords)
        )
        return y, info


def _chosen(spec: SolverSpec, kinds: Collection[str] | None) -> tuple[str, ...]:
    known = (*zoo.KINDS, "qp", "cone")
    able = [kind for kind in spec.kinds if kind in known]
    wanted = able if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [kind for kind in wanted if kind not in able]
    if unknown or not wanted:
        raise ValueError(
            f"check_solver({spec.name!r}, kinds={kinds!r}): the spec declares {list(spec.kinds)}, the kit "
            f"has problems for {[*known]}; accepted are one or more of {able}."
        )
    return tuple(wanted)
