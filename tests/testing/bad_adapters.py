"""Adapters with one mistake each, of the kind that real adapters have, and the rule each of them breaks."""

from dataclasses import replace

import numpy as np
from toy_adapters import (
    STEPS,
    NumpyNewton,
    TorchNewton,
    numpy_newton,
    read_options,
    spec_of,
    torch_step,
)

from invlayer_core import Solver, SolverResult


class Unfinished(Solver):
    pass


class NeedsArguments(NumpyNewton):
    def __init__(self, xtol):
        self.xtol = xtol


class ReturnsBareArray(Solver):
    def solve(self, problem, y0, options):
        return NumpyNewton().solve(problem, y0, options).y


class ReturnsColumn(Solver):
    def solve(self, problem, y0, options):
        result = NumpyNewton().solve(problem, y0, options)
        return replace(result, y=result.y[:, None])


class ReturnsExitCode(Solver):
    def solve(self, problem, y0, options):
        return replace(NumpyNewton().solve(problem, y0, options), success=1)


class ReturnsMeanIterations(Solver):
    def solve(self, problem, y0, options):
        return replace(NumpyNewton().solve(problem, y0, options), iterations=2.5)


class ReturnsNoMessage(Solver):
    def solve(self, problem, y0, options):
        return replace(NumpyNewton().solve(problem, y0, options), message=None)


class ReturnsListOfExtras(Solver):
    def solve(self, problem, y0, options):
        return replace(NumpyNewton().solve(problem, y0, options), aux=[1])


class IgnoresOptions(Solver):
    def solve(self, problem, y0, options):
        return numpy_newton(problem, y0, options.get("xtol", 1e-9))


class NamesNoOption(Solver):
    def solve(self, problem, y0, options):
        if options:
            raise TypeError("bad options")
        return numpy_newton(problem, y0)


class RaisesKeyError(Solver):
    def solve(self, problem, y0, options):
        for name in options:
            {"xtol": float}[name]
        return numpy_newton(problem, y0)


class StopsEarly(Solver):
    def solve(self, problem, y0, options):
        read_options(options)
        result = numpy_newton(problem, y0)
        return replace(result, y=result.y + 1e-4, success=False)


class ClaimsSuccess(Solver):
    def solve(self, problem, y0, options):
        read_options(options)
        return SolverResult(y=y0, success=True)


class AlwaysClaimsSuccess(TorchNewton):
    """Right where there is a root; elsewhere its claim is wrong, as that of a least-squares method."""

    def solve(self, problem, y0, options):
        return replace(super().solve(problem, y0, options), success=True)


class ClaimsNothing(Solver):
    def solve(self, problem, y0, options):
        return replace(NumpyNewton().solve(problem, y0, options), success=False)


class ReturnsDouble(Solver):
    batched = True

    def solve(self, problem, y0, options):
        result = TorchNewton().solve(problem, y0, options)
        return replace(result, y=result.y.double())


class WantsDoubleAccuracy(Solver):
    def solve(self, problem, y0, options):
        result = NumpyNewton().solve(problem, y0, options)
        if np.abs(problem.residual(result.y)).max() > 1e-13:
            raise RuntimeError("stagnation")
        return result


class HopsBetweenRoots(Solver):
    """Deterministic, but the start hangs on the last bits of F."""

    def solve(self, problem, y0, options):
        read_options(options)
        parity = int(np.abs(problem.residual(y0)).sum() * 2.0**40) % 2
        return numpy_newton(problem, y0 - 4.0 * parity)


class StartsFromLastSample(Solver):
    last = None

    def solve(self, problem, y0, options):
        read_options(options)
        start = y0 if problem.index == 0 else type(self).last
        result = numpy_newton(problem, start)
        type(self).last = result.y
        return result


class FirstSampleDecides(Solver):
    """The whole batch stops when its first sample has converged."""

    batched = True

    def solve(self, problem, y0, options):
        read_options(options)
        y = y0
        for _ in range(STEPS):
            step = torch_step(problem, y)
            y = y - step
            if len(y) == 0 or step[0].norm() <= 1e-3 * y[0].norm():
                break
        return SolverResult(y=y)


class Squeezes(Solver):
    def solve(self, problem, y0, options):
        result = NumpyNewton().solve(problem, y0, options)
        return replace(result, y=result.y.squeeze())


class GuessesShape(Solver):
    batched = True

    def solve(self, problem, y0, options):
        result = TorchNewton().solve(problem, y0, options)
        return replace(result, y=result.y.mT) if len(y0) == problem.size else result


class SwallowsExceptions(Solver):
    def solve(self, problem, y0, options):
        xtol = read_options(options, "xtol")
        try:
            return numpy_newton(problem, y0, xtol)
        except Exception:
            return SolverResult(y=y0)


class StaysBusy(Solver):
    """An interrupted solve leaves the lock closed: all later ones fail."""

    busy = False

    def solve(self, problem, y0, options):
        read_options(options)
        if type(self).busy:
            raise RuntimeError("a solve is already running")
        type(self).busy = True
        result = numpy_newton(problem, y0)
        type(self).busy = False
        return result


class ReturnsNoneOnFailure(Solver):
    def solve(self, problem, y0, options):
        result = NumpyNewton().solve(problem, y0, options)
        return result if result.success else replace(result, y=None)


class CommonStepLength(Solver):
    """One step length for the batch: the longest step of any sample."""

    batched = True

    def solve(self, problem, y0, options):
        read_options(options)
        y = y0
        for _ in range(STEPS):
            step = torch_step(problem, y)
            longest = max(1.0, float(step.norm(dim=-1).max())) if len(y) else 1.0
            y = y - step / longest
        return SolverResult(y=y)


class CommonStoppingTest(Solver):
    """One norm for the batch: NaN in a sample ends the solve of all."""

    batched = True

    def solve(self, problem, y0, options):
        read_options(options)
        y, residual = y0, problem.residual(y0)
        for _ in range(STEPS):
            if not residual.norm() > 1e-6:
                break
            y = y - torch_step(problem, y)
            residual = problem.residual(y)
        return SolverResult(y=y)


class PopsOptions(Solver):
    def solve(self, problem, y0, options):
        xtol = options.pop("xtol", 1e-9)
        read_options(options)
        return numpy_newton(problem, y0, xtol)


class CountsCalls(Solver):
    def __init__(self):
        self.calls = 0

    def solve(self, problem, y0, options):
        self.calls += 1
        return NumpyNewton().solve(problem, y0, options)


class CountsCallsOfAll(Solver):
    calls = 0

    def solve(self, problem, y0, options):
        type(self).calls += 1
        return NumpyNewton().solve(problem, y0, options)


class StartsAtRandom(Solver):
    generator = np.random.default_rng(0)

    def solve(self, problem, y0, options):
        xtol = read_options(options, "xtol")
        return numpy_newton(problem, y0 + 0.01 * self.generator.normal(size=y0.shape), max(xtol, 1e-5))


class SeedsTheWorld(Solver):
    def solve(self, problem, y0, options):
        read_options(options)
        np.random.seed(0)
        return numpy_newton(problem, y0 + 0.01 * np.random.normal(size=y0.shape))


class SilencesNumpy(Solver):
    def solve(self, problem, y0, options):
        np.seterr(all="ignore")
        return NumpyNewton().solve(problem, y0, options)


class HoldsLambda(Solver):
    def __init__(self):
        self.newton = lambda problem, y0: numpy_newton(problem, y0)

    def solve(self, problem, y0, options):
        read_options(options)
        return self.newton(problem, y0)


class ForgetsWhenCopied(Solver):
    def __init__(self):
        self.offset = 0.0

    def __reduce__(self):
        return _forgetful, ()

    def solve(self, problem, y0, options):
        read_options(options)
        return replace(numpy_newton(problem, y0), y=numpy_newton(problem, y0).y + self.offset)


def _forgetful():
    solver = ForgetsWhenCopied()
    solver.offset = 1e-9
    return solver


class SharesScratch(Solver):
    """The iterate is an attribute: two threads work on one."""

    y = None

    def solve(self, problem, y0, options):
        read_options(options)
        type(self).y = y0
        for k in range(STEPS):
            step = np.linalg.solve(problem.jacobian(self.y), problem.residual(self.y))
            type(self).y = self.y - step
            if np.abs(step).max() <= 1e-9:
                return SolverResult(y=self.y, iterations=k)
        return SolverResult(y=self.y, success=False)


BREAKS = [
    ("loading", spec_of(Unfinished)),
    ("loading", spec_of(NeedsArguments)),
    ("loading", spec_of(NumpyNewton, factory="bad_adapters:NoSuchClass")),
    ("loading", spec_of(NumpyNewton, factory="no_such_module:Newton")),
    ("loading", spec_of(NumpyNewton, requires=("no-such-distribution",))),
    ("batched_flag", spec_of(NumpyNewton, batched=True)),
    ("batched_flag", spec_of(TorchNewton, batched=False)),
    ("result_fields", spec_of(ReturnsBareArray)),
    ("result_fields", spec_of(ReturnsColumn)),
    ("result_fields", spec_of(ReturnsExitCode)),
    ("result_fields", spec_of(ReturnsMeanIterations)),
    ("result_fields", spec_of(ReturnsNoMessage)),
    ("result_fields", spec_of(ReturnsListOfExtras)),
    ("unknown_option", spec_of(IgnoresOptions)),
    ("unknown_option", spec_of(NamesNoOption)),
    ("unknown_option", spec_of(RaisesKeyError)),
    ("values", spec_of(StopsEarly)),
    ("claims", spec_of(ClaimsSuccess)),
    ("claims", spec_of(ClaimsNothing)),
    ("dtype", spec_of(ReturnsDouble)),
    ("dtype", spec_of(WantsDoubleAccuracy)),
    ("gradients", spec_of(HopsBetweenRoots)),
    ("batch_is_its_samples", spec_of(StartsFromLastSample)),
    ("permutation", spec_of(FirstSampleDecides)),
    ("shapes", spec_of(Squeezes)),
    ("shapes", spec_of(GuessesShape)),
    ("exceptions", spec_of(SwallowsExceptions)),
    ("exceptions", spec_of(StaysBusy)),
    ("no_root", spec_of(ReturnsNoneOnFailure)),
    ("no_root", spec_of(CommonStepLength)),
    ("nan_args", spec_of(CommonStoppingTest)),
    ("no_mutation", spec_of(PopsOptions)),
    ("no_mutation", spec_of(CountsCalls)),
    ("no_mutation", spec_of(CountsCallsOfAll)),
    ("repeatable", spec_of(StartsAtRandom)),
    ("global_state", spec_of(SeedsTheWorld)),
    ("global_state", spec_of(SilencesNumpy)),
    ("pickling", spec_of(HoldsLambda)),
    ("pickling", spec_of(ForgetsWhenCopied)),
    ("thread_safety", spec_of(SharesScratch)),
]
"""Rule and spec. ``registration`` is not here: it needs an installed distribution."""
