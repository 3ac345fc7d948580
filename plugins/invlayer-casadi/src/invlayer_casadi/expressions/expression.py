"""One CasADi Function on the nonzeros of its inputs, by CasADi on the CPU or by its torch translation.

A tape through the instructions would differentiate ``where(x > 0, sqrt(x), 0)`` to NaN at x = 0, where
CasADi's derivative is 0. So no tape is made: the rule of a Function is the Function that CasADi derives from
it, whose rule is CasADi's next one, and derivatives of every order are exact.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Final, Literal, final

import casadi as ca
import torch
from torch import Tensor

from invlayer_casadi.expressions.buffers import BUILDING, ThreadFunctions
from invlayer_casadi.expressions.execution import (
    LevelwiseExecution,
    LinewiseExecution,
    linewise_pays,
    run_program,
)
from invlayer_casadi.expressions.patterns import fitted, projected, sources_of
from invlayer_casadi.expressions.program import Program, UntranslatableError, program_of
from invlayer_core import (
    ConditionsError,
    ConvergenceError,
    ConvergenceWarning,
    ForeignFunction,
    PerformanceWarning,
)

__all__ = ["Backend", "Expression", "OnFailure"]

Backend = Literal["auto", "casadi", "torch"]
OnFailure = Literal["raise", "warn", "nan"]

_TORCH_FROM: Final = 2048  # samples on a CPU from which the translation pays
_TRANSLATED_UNASKED: Final = 50_000  # instructions; walking them takes a second


@final
class Expression(ForeignFunction):
    """A Function on nonzeros, whose derivatives are Functions again: CasADi's own, of every order.

    Parameters
    ----------
    function : casadi.Function
    backend : {"auto", "casadi", "torch"}
    on_failure : {"raise", "warn", "nan"}
        What to do where a solver inside fails for a sample.
    """

    def __init__(
        self, function: ca.Function, backend: Backend = "auto", on_failure: OnFailure = "warn"
    ) -> None:
        self.function, self.backend, self.on_failure = function, backend, on_failure
        self.name = f"CasadiFunction {function.name()!r}"
        self._functions = ThreadFunctions(function)
        self._taken = [function.nnz_in(i) for i in range(function.n_in())]
        self._sources: list[Tensor | None] = []  # of a rule: where its outputs stand in what it derives
        self._sizes = [function.nnz_out(i) for i in range(function.n_out())]
        self._executions: dict[Any, LevelwiseExecution | LinewiseExecution] = {}
        self._derivatives: dict[Any, Expression] = {}
        self._program: Program | UntranslatableError | None = None
        self._known: tuple[Tensor, ...] | None = None
        self.one_by_one = self._functions.has_solver  # whether a sample may fail, and each is evaluated alone

    def __reduce__(self) -> tuple[Any, ...]:
        return Expression, (self.function, self.backend, self.on_failure)

    def reverse(self, wanted: tuple[bool, ...]) -> Expression:
        """(inputs, outputs, cotangents) ↦ the cotangents of those inputs that are wanted."""
        if wanted not in self._derivatives:
            kept = [i for i, want in enumerate(wanted) if want]
            with BUILDING:
                whole = self.function.reverse(1)
                if len(kept) < whole.n_out():
                    whole = whole.slice(whole.name(), list(range(whole.n_in())), kept)
                patterns = [self.function.sparsity_in(i) for i in kept]
                self._derivatives[wanted] = self._derived(whole, patterns)
        return self._derivatives[wanted]

    def forward(self) -> Expression:
        """(inputs, outputs, tangents) ↦ the tangents of all outputs."""
        if "forward" not in self._derivatives:
            with BUILDING:
                patterns = [self.function.sparsity_out(i) for i in range(self.function.n_out())]
                self._derivatives["forward"] = self._derived(self.function.forward(1), patterns)
        return self._derivatives["forward"]

    def _derived(self, function: ca.Function, patterns: Sequence[ca.Sparsity]) -> Expression:
        """A rule, whose outputs are wanted on these patterns."""
        derived = Expression(function, self.backend, self.on_failure)
        derived.one_by_one = self.one_by_one
        derived._sources = [sources_of(function.sparsity_out(i), p) for i, p in enumerate(patterns)]
        return derived

    def _as_rule(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this derivative Function gives, on the patterns of what it derives."""
        found = self(*fitted(self._taken, tensors))
        return [projected(tensor, sources) for tensor, sources in zip(found, self._sources, strict=True)]

    def pull(
        self,
        wanted: tuple[bool, ...],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
    ) -> list[Tensor]:
        return self.reverse(wanted)._as_rule([*inputs, *outputs, *cotangents])

    def push(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> list[Tensor]:
        return self.forward()._as_rule([*inputs, *outputs, *tangents])

    def with_outputs(self, outputs: Sequence[Tensor]) -> Expression:
        """The same at a point where the outputs ``(B, nnz)`` are known already; derivatives are shared."""
        twin = copy.copy(self)
        twin._known = tuple(outputs)
        return twin

    def __copy__(self) -> Expression:
        twin = Expression.__new__(Expression)
        twin.__dict__.update(self.__dict__)
        return twin

    @property
    def untranslatable(self) -> str | None:
        """Why there is no torch translation; None if there is one."""
        if self._program is None:
            try:
                self._program = program_of(self.function)
            except UntranslatableError as reason:
                self._program = reason
        return str(self._program) if isinstance(self._program, UntranslatableError) else None

    def runs_on(self, batch: int, device: torch.device) -> Literal["casadi", "torch"]:
        """Which of the two a call takes."""
        if self.backend == "casadi":
            return "casadi"
        on_cpu = device.type == "cpu"
        if self.backend == "auto" and on_cpu and (batch < _TORCH_FROM or self._is_long):
            return "casadi"
        if self.untranslatable is None:
            return "torch"
        if self.backend == "torch":
            raise ConditionsError(
                f"CasadiFunction {self.function.name()!r} with backend='torch' has no translation to torch: "
                f"{self.untranslatable}. Accepted for it are backend='auto' and 'casadi', which evaluate it "
                "on the CPU."
            )
        return "casadi"

    @property
    def _is_long(self) -> bool:
        return (
            self.function.class_name() != "SXFunction" or self.function.n_instructions() > _TRANSLATED_UNASKED
        )

    def evaluate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``(B, nnz)`` of every input to ``(B, nnz)`` of every output, without gradient."""
        if self._known is not None:
            return list(self._known)
        like = inputs[0] if inputs else torch.empty(1, 0, dtype=torch.float64)
        on_cpu = like.device.type == "cpu"
        if self.runs_on(like.shape[0], like.device) == "torch":
            precise = [tensor.double() for tensor in inputs] if on_cpu else inputs
            results = run_program(self._execution(precise), precise)
            return [result.to(like.dtype) for result in results]
        if not on_cpu and self.backend == "auto":
            warnings.warn(
                f"CasadiFunction {self.function.name()!r} is evaluated on the CPU, though its tensors are on "
                f"{like.device}: {self.untranslatable}. backend='casadi' asks for that, and silences this.",
                PerformanceWarning,
                stacklevel=2,
            )
        return [result.to(like) for result in self._by_casadi(inputs, like.shape[0])]

    def _execution(self, inputs: Sequence[Tensor]) -> LevelwiseExecution | LinewiseExecution:
        kind = LinewiseExecution if linewise_pays(inputs) else LevelwiseExecution
        key = kind, inputs[0].dtype, inputs[0].device
        if key not in self._executions:
            assert isinstance(self._program, Program)
            self._executions[key] = kind(self._program, inputs[0])
        return self._executions[key]

    def _by_casadi(self, inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
        given = [tensor.to("cpu", torch.float64).contiguous() for tensor in inputs]
        results = [torch.empty(batch, size, dtype=torch.float64) for size in self._sizes]
        if batch == 0:
            return results
        if self.one_by_one:
            self._one_by_one(given, results)
        else:
            call = self._functions.buffer(batch)
            call([tensor.numpy() for tensor in given], [tensor.numpy() for tensor in results])
        return results

    def _one_by_one(self, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Where a solver inside may fail: each sample alone, and NaN for those that do."""
        arrays, targets = [t.numpy() for t in given], [t.numpy() for t in results]
        failed: list[tuple[int, str]] = []
        for i in range(results[0].shape[0]):
            try:
                with self._functions.exclusive():
                    self._functions.buffer(1)([a[i] for a in arrays], [t[i] for t in targets])
            except RuntimeError as error:
                failed.append((i, str(error).strip()))
                for target in targets:
                    target[i] = float("nan")
        if failed:
            self._report(failed, results[0].shape[0])

    def _report(self, failed: Sequence[tuple[int, str]], batch: int) -> None:
        first, words = failed[0]
        message = (
            f"CasadiFunction {self.function.name()!r}: {len(failed)} of {batch} samples are NaN, for a "
            f"solver inside failed; sample {first}: {words}"
        )
        if self.on_failure == "raise":
            raise ConvergenceError(message)
        if self.on_failure == "warn":
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
