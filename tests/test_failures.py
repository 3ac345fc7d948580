"""Samples that fail: what they become, what the others keep, and what the messages say."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import invlayer_core as inv
from invlayer_core import Solver, SolverResult, Status

pytestmark = pytest.mark.usefixtures("float64")

BATCH, FAILING = 8, [2, 5]
GOOD = [i for i in range(BATCH) if i not in FAILING]


# --- solvers, good and bad ------------------------------------------------------------------------------


class NumpyNewton(Solver):
    """A per-sample solver in NumPy that reports honestly."""

    def solve(self, problem: Any, y0: np.ndarray, options: Any) -> SolverResult:
        y, step = y0, np.array([np.inf])
        for _ in range(30):
            step = np.linalg.solve(problem.jacobian(y), problem.residual(y))
            y = y - step
        return SolverResult(
            y=y, success=bool(np.all(np.abs(step) <= 1e-12)), iterations=30, message="30 steps"
        )


class Broken(Solver):
    """NumpyNewton, except for the samples where ``fault`` strikes."""

    def __init__(self, fault: Callable[[np.ndarray], Any], samples: list[int]) -> None:
        self.fault, self.samples = fault, samples

    def solve(self, problem: Any, y0: np.ndarray, options: Any) -> SolverResult:
        if problem.index in self.samples:
            return self.fault(y0)
        return NumpyNewton().solve(problem, y0, options)


def throw(y0: np.ndarray) -> SolverResult:
    raise ArithmeticError("pivot is zero")


FAULTS: dict[str, tuple[Callable[[np.ndarray], Any], Status, str]] = {
    "lies": (
        lambda y0: SolverResult(y=y0, success=True),
        Status.FALSE_CONVERGENCE,
        r"sample 2: FALSE_CONVERGENCE, the solver reported success, .* residual 4\.567",
    ),
    "gives up": (
        lambda y0: SolverResult(y=y0, success=False, message="too\n hard"),
        Status.NOT_CONVERGED,
        r"sample 2: NOT_CONVERGED, the solver gave up; measured residual 4\.567.* too hard",
    ),
    "throws": (throw, Status.SOLVER_ERROR, r"sample 2: SOLVER_ERROR.*ArithmeticError: pivot is zero"),
    "NaN": (lambda y0: SolverResult(y=y0 * np.nan), Status.NOT_FINITE, "sample 2: NOT_FINITE"),
    "wrong shape": (
        lambda y0: SolverResult(y=np.zeros(3)),
        Status.WRONG_SHAPE,
        r"sample 2: WRONG_SHAPE.*shape \(3,\)",
    ),
    "extra dim": (lambda y0: SolverResult(y=np.zeros((1, 2))), Status.WRONG_SHAPE, r"shape \(1, 2\)"),
    "complex": (lambda y0: SolverResult(y=y0 * 1j), Status.WRONG_SHAPE, "complex128"),
    "text": (lambda y0: SolverResult(y="zero"), Status.WRONG_SHAPE, "not an array of numbers"),
    "no result": (lambda y0: None, Status.WRONG_SHAPE, r"solve\(\) returned NoneType"),
}
EVERY_FAULT = pytest.mark.parametrize(("fault", "status", "message"), FAULTS.values(), ids=FAULTS)


def conditions(y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """Elementwise arithmetic alone, so that one sample's bits cannot depend on the size of the batch."""
    return s * y * y + 0.1 * y * y.flip(-1) - b


def known(batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """y0, the shared s and the b of every sample."""
    y0 = torch.full((batch, 2), 2.0)
    s = torch.tensor([1.0, 1.25], requires_grad=True)
    b = (torch.linspace(0.25, 2.0, 2 * batch).reshape(batch, 2)).requires_grad_()
    return y0, s, b


@EVERY_FAULT
def test_fault_is_caught_and_named(fault: Any, status: Status, message: str) -> None:
    y0, s, b = known()
    with pytest.raises(inv.ConvergenceError, match=message) as caught:
        inv.root(conditions, y0, args=(s, b), solver=Broken(fault, FAILING))
    assert "2 of 8 samples" in str(caught.value)
    info = caught.value.info
    assert [i for i in range(BATCH) if info.status[i] is status] == FAILING
    assert info.ok.tolist() == [i in GOOD for i in range(BATCH)]
    assert bool((info.residual[GOOD] <= info.tolerance[GOOD]).all())


def test_exception_of_the_solver_is_the_cause() -> None:
    y0, s, b = known()
    with pytest.raises(inv.ConvergenceError) as caught:
        inv.root(conditions, y0, args=(s, b), solver=Broken(throw, FAILING))
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_message_names_five_samples_at_most() -> None:
    y0, s, b = known()
    with pytest.raises(
        inv.ConvergenceError, match=r"8 of 8 samples(?s:.*)sample 4(?s:.*)and 3 more"
    ) as caught:
        inv.root(conditions, y0, args=(s, b), solver=Broken(FAULTS["lies"][0], list(range(BATCH))))
    assert "sample 5" not in str(caught.value)


def test_message_says_that_inputs_held_nan() -> None:
    y0, s, b = known()
    b = b.detach().clone()
    b[3, 0] = torch.nan
    with pytest.raises(inv.ConvergenceError, match="inputs already hold NaN"):
        by_newton(y0, s, b)


@pytest.mark.parametrize("error", [TypeError, NameError, AttributeError])
def test_wrong_code_is_not_a_failed_sample(error: type[Exception]) -> None:
    def wrong(y0: np.ndarray) -> SolverResult:
        raise error("wrong code")

    y0, s, b = known()
    with pytest.raises(error, match="wrong code"):
        inv.root(conditions, y0, args=(s, b), solver=Broken(wrong, list(range(BATCH))), on_failure="nan")


class BrokenBatch(Solver):
    """A batched solver with a fault."""

    batched = True

    def __init__(self, fault: Callable[[Tensor], Any]) -> None:
        self.fault = fault

    def solve(self, problem: Any, y0: Tensor, options: Any) -> SolverResult:
        return self.fault(y0)


def throw_batch(y0: Tensor) -> SolverResult:
    raise ArithmeticError("pivot is zero")


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (lambda y0: SolverResult(y=y0), Status.FALSE_CONVERGENCE, "FALSE_CONVERGENCE"),
        (throw_batch, Status.SOLVER_ERROR, "ArithmeticError: pivot is zero"),
        (
            lambda y0: SolverResult(y=y0[:, :1]),
            Status.WRONG_SHAPE,
            r"shape \(8, 1\); accepted is a real \(8, 2\)",
        ),
        (lambda y0: SolverResult(y=y0.long()), Status.WRONG_SHAPE, "accepted is a real"),
        (lambda y0: SolverResult(y=y0.numpy()), Status.WRONG_SHAPE, "WRONG_SHAPE"),
        (lambda y0: y0, Status.WRONG_SHAPE, r"solve\(\) returned Tensor, not a SolverResult"),
        (lambda y0: SolverResult(y=y0 / 0), Status.NOT_FINITE, "NOT_FINITE"),
        (lambda y0: SolverResult(y=y0, success=torch.zeros(8) > 1), Status.NOT_CONVERGED, "gave up"),
    ],
    ids=["lies", "throws", "shape", "integer", "NumPy", "bare tensor", "infinite", "gives up"],
)
def test_batched_fault_is_caught_and_named(fault: Any, status: Status, message: str) -> None:
    y0, s, b = known()
    with pytest.raises(inv.ConvergenceError, match=message) as caught:
        inv.root(conditions, y0, args=(s, b), solver=BrokenBatch(fault))
    assert set(caught.value.info.status) == {status}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda y0: y0.numpy(), "returned ndarray; accepted is one real floating-point torch.Tensor"),
        (lambda y0: y0.long(), r"returned dtype torch\.int64"),
        (lambda y0: None, "returned NoneType"),
        (lambda y0: (y0, "aux"), "returned tuple"),
    ],
    ids=["NumPy", "integer", "None", "pair"],
)
def test_plain_callable_with_a_wrong_type(result: Any, message: str) -> None:
    y0, s, b = known()
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(conditions, y0, args=(s, b), solver=lambda y0, s, b: result(y0))


@pytest.mark.parametrize("shape", [(8, 3), (8,), (2,), (1, 8, 2), (16,)])
def test_plain_callable_with_a_wrong_shape(shape: tuple[int, ...]) -> None:
    """Even where the conditions hold at what it returned, it is not what y0 asked for."""
    with pytest.raises(inv.InvlayerError, match="shape"):
        inv.root(lambda y: y - 1, torch.zeros(8, 2), solver=lambda y0: torch.ones(shape))


def test_lying_callable() -> None:
    y0, s, b = known()
    with pytest.raises(inv.ConvergenceError, match=r"8 of 8 samples(?s:.*)FALSE_CONVERGENCE"):
        inv.root(conditions, y0, args=(s, b), solver=lambda y0, s, b: y0)


# --- the headline example -------------------------------------------------------------------------------


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize(
    ("solver", "options"), [("scipy.fsolve", {"fprime": None}), ("scipy.root", {"jac": False})]
)
def test_scipy_calls_a_wrong_root_success(solver: str, options: dict[str, Any]) -> None:
    """x² − 2x from x = 1, where the derivative vanishes: SciPy returns 1.01, without a word (scipy#17488)."""
    start = torch.ones(1)
    with pytest.raises(
        inv.ConvergenceError, match=r"FALSE_CONVERGENCE.* residual 0\.9999, tolerance 1e-06"
    ) as caught:
        inv.root(lambda x: x**2 - 2 * x, start, solver=solver, options=options)
    info = caught.value.info
    assert info.solver == solver
    assert info.status == (Status.FALSE_CONVERGENCE,)
    assert abs(float(info.residual) - 0.9999) < 1e-6
    assert not bool(info.ok)


ROOTLESS = {
    "atan y = 2": lambda y: torch.atan(y) - 2,
    "1 + exp(-y) = 0": lambda y: 1 + torch.exp(-y),
    "1 + 1/(1 + y²) = 0": lambda y: 1 + 1 / (1 + y * y),
    "softplus y = -1": lambda y: torch.nn.functional.softplus(y) + 1,
}


@pytest.mark.parametrize("f", ROOTLESS.values(), ids=ROOTLESS)
@pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.root", marks=pytest.mark.plugin("invlayer-scipy"))]
)
def test_solution_that_ran_away_is_no_root(f: Any, solver: str) -> None:
    """The residual stays at 0.4 or 1 while y grows without bound: a large y must not excuse it."""
    with pytest.raises(inv.ConvergenceError, match="1 of 1 samples"):
        inv.root(f, torch.tensor([0.3]), solver=solver)


@pytest.mark.xfail(strict=True, reason="the tolerance is taken from two evaluations of F, which differ here")
def test_conditions_that_roll_dice_certify_nothing() -> None:
    """Dropout in train mode: no y makes F zero, and least of all this one."""
    dropout = torch.nn.Dropout(0.5)
    with pytest.raises(inv.InvlayerError):
        inv.root(lambda y: y - dropout(y) / 2 - 1, torch.zeros(4, 16), solver=lambda y0: y0 + 5)


# --- the policies, with two of eight samples failing ----------------------------------------------------


def by_newton(y0: Tensor, s: Tensor, b: Tensor, **keywords: Any) -> Any:
    return inv.root(conditions, y0, args=(s, b), options={"maxiter": 20}, **keywords)


def per_sample(y0: Tensor, s: Tensor, b: Tensor, **keywords: Any) -> Any:
    return inv.root(conditions, y0, args=(s, b), solver=NumpyNewton(), **keywords)


def by_scipy(y0: Tensor, s: Tensor, b: Tensor, **keywords: Any) -> Any:
    return inv.root(conditions, y0, args=(s, b), solver="scipy.root", **keywords)


def opaque(s: Tensor, b: Tensor) -> Tensor:
    """Newton's method elementwise in NumPy, on the decoupled part first, then on all."""
    s, b = s.numpy(), b.numpy()
    y = np.full(b.shape, 2.0)
    with np.errstate(invalid="ignore"):
        for _ in range(60):
            y = y - (s * y * y + 0.1 * y * y[..., ::-1] - b) / (2 * s * y + 0.1 * y[..., ::-1])
    return torch.from_numpy(y)


def by_callable(y0: Tensor, s: Tensor, b: Tensor, **keywords: Any) -> Any:
    return inv.root(conditions, y0, args=(s, b), solver=lambda y0, s, b: opaque(s, b), **keywords)


def by_function(y0: Tensor, s: Tensor, b: Tensor, **keywords: Any) -> Any:
    return inv.implicit_function(conditions=conditions, **keywords)(lambda s, b: opaque(s, b))(s, b)


SOLVES = {
    "torch.newton": by_newton,
    "per-sample": per_sample,
    "callable": by_callable,
    "implicit_function": by_function,
    "scipy.root": pytest.param(by_scipy, marks=pytest.mark.plugin("invlayer-scipy"), id="scipy.root"),
}
EVERY_SOLVE = pytest.mark.parametrize(
    "solve",
    [value if name == "scipy.root" else pytest.param(value, id=name) for name, value in SOLVES.items()],
)
CAUSES = {"no root": -1.0, "NaN args": torch.nan, "infinite args": torch.inf}
EVERY_CAUSE = pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)


def failing_inputs(cause: float) -> tuple[Tensor, Tensor, Tensor]:
    y0, s, b = known()
    b = b.detach().clone()
    b[FAILING] = cause
    return y0, s, b.requires_grad_()


def loss(y: Tensor) -> Tensor:
    return (y * y * y).sum()


def derivatives(solve: Any, y0: Tensor, s: Tensor, b: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """Values of ``rows``, with first and second derivatives; rows are chosen before the loss."""
    y = solve(y0, s, b)
    first = torch.autograd.grad(loss(y[rows]), (s, b), create_graph=True)
    second = torch.autograd.grad(loss(first[1][rows]), (s, b))
    return y.detach()[rows], first[0].detach(), first[1].detach()[rows], second[0], second[1][rows]


def alone(solve: Any, cause: float, *rows: int) -> tuple[Tensor, ...]:
    y0, s, b = failing_inputs(cause)
    some = b.detach()[list(rows)].clone().requires_grad_()
    return derivatives(solve, y0[list(rows)], s, some, list(range(len(rows))))


@EVERY_SOLVE
@EVERY_CAUSE
@pytest.mark.parametrize("policy", ["nan", "zero_grad", "warn"])
def test_others_keep_every_bit(solve: Any, cause: float, policy: str) -> None:
    """Value, gradient and second derivative of the six, with and without the two that fail."""
    y0, s, b = failing_inputs(cause)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inv.ConvergenceWarning)
        together = derivatives(lambda *args: solve(*args, on_failure=policy), y0, s, b, GOOD)
    six = alone(solve, cause, *GOOD)
    assert torch.equal(together[0], six[0])
    assert torch.equal(together[2], six[2])
    assert torch.equal(together[4], six[4])
    torch.testing.assert_close((together[1], together[3]), (six[1], six[3]), rtol=1e-13, atol=0)
    for row in (0, 2, 5):
        one = alone(solve, cause, GOOD[row])
        assert torch.equal(together[0][row], one[0][0])
        assert torch.equal(together[2][row], one[2][0])
        assert torch.equal(together[4][row], one[4][0])


@EVERY_SOLVE
@EVERY_CAUSE
def test_zero_grad_policy(solve: Any, cause: float) -> None:
    """Every sample enters the loss; those that failed contribute nothing to any gradient."""
    y0, s, b = failing_inputs(cause)
    y, info = solve(y0, s, b, on_failure="zero_grad", return_info=True)
    assert info.ok.tolist() == [i in GOOD for i in range(BATCH)]
    of_s, of_b = torch.autograd.grad(loss(y.nan_to_num(7.0)), (s, b), create_graph=True)
    six = alone(solve, cause, *GOOD)
    torch.testing.assert_close(of_s.detach(), six[1], rtol=1e-13, atol=0)
    assert torch.equal(of_b[FAILING], torch.zeros(2, 2))
    assert torch.equal(of_b[GOOD], six[2])
    second = torch.autograd.grad(of_s.sum() + of_b[GOOD].sum(), (s, b))
    assert bool(second[0].isfinite().all())
    assert torch.equal(second[1][FAILING], torch.zeros(2, 2))


@EVERY_SOLVE
@EVERY_CAUSE
def test_nan_policy(solve: Any, cause: float) -> None:
    y0, s, b = failing_inputs(cause)
    y = solve(y0, s, b, on_failure="nan")
    assert y.isnan().all(-1).tolist() == [i in FAILING for i in range(BATCH)]
    (of_b,) = torch.autograd.grad(y.sum(), b)
    assert of_b.isnan().all(-1).tolist() == [i in FAILING for i in range(BATCH)]
    assert of_b[GOOD].isfinite().all()


@EVERY_SOLVE
def test_warn_policy(solve: Any) -> None:
    y0, s, b = failing_inputs(-1.0)
    with pytest.warns(inv.ConvergenceWarning, match=r"2 of 8 samples(?s:.*)sample 2(?s:.*)sample 5"):
        y, info = solve(y0, s, b, on_failure="warn", return_info=True)
    assert info.ok.tolist() == [i in GOOD for i in range(BATCH)]
    assert torch.equal(y.detach()[GOOD], alone(solve, -1.0, *GOOD)[0])


@EVERY_SOLVE
@EVERY_CAUSE
def test_raise_policy_is_the_default(solve: Any, cause: float) -> None:
    y0, s, b = failing_inputs(cause)
    with pytest.raises(inv.ConvergenceError, match=r"2 of 8 samples(?s:.*)sample 2(?s:.*)sample 5") as caught:
        solve(y0, s, b)
    assert not any(status.ok for i, status in enumerate(caught.value.info.status) if i in FAILING)


def test_unknown_policy() -> None:
    with pytest.raises(inv.ConditionsError, match="on_failure='ignore': accepted are 'raise', 'warn'"):
        by_newton(*known(), on_failure="ignore")


@pytest.mark.parametrize("policy", ["nan", "zero_grad"])
def test_failed_samples_in_forward_mode(policy: str) -> None:
    y0, s, b = (tensor.detach() for tensor in failing_inputs(torch.nan))
    tangents = torch.ones_like(s), torch.ones_like(b)
    _, moved = torch.func.jvp(lambda s, b: by_newton(y0, s, b, on_failure=policy), (s, b), tangents)
    of_six = torch.func.jvp(
        lambda s, b: by_newton(y0[GOOD], s, b), (s, b[GOOD]), (tangents[0], tangents[1][GOOD])
    )
    assert torch.equal(moved[GOOD], of_six[1])
    expected = torch.zeros(2, 2) if policy == "zero_grad" else torch.full((2, 2), torch.nan)
    torch.testing.assert_close(moved[FAILING], expected, equal_nan=True)


def test_failed_samples_under_vmap() -> None:
    y0, s, b = (tensor.detach() for tensor in failing_inputs(-1.0))

    def total(y0: Tensor, b: Tensor) -> Tensor:
        return loss(by_newton(y0, s, b, on_failure="zero_grad"))

    per_sample = vmap(grad(total, argnums=1))(y0, b)
    assert torch.equal(per_sample[FAILING], torch.zeros(2, 2))
    torch.testing.assert_close(per_sample[GOOD], alone(by_newton, -1.0, *GOOD)[2], rtol=1e-14, atol=0)


def test_args_outside_the_domain_keep_shared_gradients_finite() -> None:
    """log of a negative arg: the arg is finite, F and its derivative there are not."""
    s = torch.tensor(2.0, requires_grad=True)
    a = torch.tensor([[2.0], [-1.0], [3.0]], requires_grad=True)

    def total(s: Tensor, a: Tensor) -> Tensor:
        y = inv.root(
            lambda y, s, a: y + y**3 - s * a.log(), torch.ones(len(a), 1), args=(s, a), on_failure="zero_grad"
        )
        return y.nan_to_num().sum()

    of_s, of_a = torch.autograd.grad(total(s, a), (s, a))
    (expected,) = torch.autograd.grad(total(s, a.detach()[[0, 2]]), s)
    torch.testing.assert_close(of_s, expected)
    assert float(of_a[1]) == 0


def test_unknown_outside_the_domain_of_the_others_args() -> None:
    """Finite y and finite args of a failed sample, at which F has no derivative."""
    s = torch.tensor(2.0, requires_grad=True)
    a = torch.tensor([[4.0], [0.0], [9.0]], requires_grad=True)

    def total(s: Tensor, a: Tensor) -> Tensor:
        solver = lambda y0, s, a: torch.where(a == 0, 1.0, s.detach() * a.sqrt())  # noqa: E731
        y = inv.root(
            lambda y, s, a: y - s * a.sqrt(),
            torch.ones(len(a), 1),
            args=(s, a),
            solver=solver,
            on_failure="zero_grad",
        )
        return y.sum()

    of_s, of_a = torch.autograd.grad(total(s, a), (s, a))
    torch.testing.assert_close(of_s, torch.tensor(5.0))
    torch.testing.assert_close(of_a, torch.tensor([[0.5], [0.0], [1 / 3]]))


@pytest.mark.parametrize("policy", ["nan", "zero_grad"])
def test_whole_batch_fails(policy: str) -> None:
    s = torch.tensor(2.0, requires_grad=True)
    a = torch.full((3, 1), torch.nan, requires_grad=True)
    solver = lambda y0, s, a: torch.full((3, 1), torch.nan)  # noqa: E731
    y = inv.root(
        lambda y, s, a: s * y.log() - a, torch.ones(3, 1), args=(s, a), solver=solver, on_failure=policy
    )
    of_s, of_a = torch.autograd.grad(y.nan_to_num().sum(), (s, a))
    assert float(of_s) == 0
    assert torch.equal(of_a, torch.zeros(3, 1))


def test_unverifiable_samples_survive_a_failed_neighbour() -> None:
    """With only a Jacobian there is nothing to measure; a neighbour's NaN changes nothing about that."""
    x = torch.tensor([[0.5], [2.0], [0.25]], requires_grad=True)
    jacobian = lambda y: torch.diag_embed(torch.cos(y))  # noqa: E731
    with pytest.warns(inv.ConvergenceWarning, match=r"1 of 3 samples(?s:.*)sample 1: NOT_FINITE"):
        y = inv.inverse(x, torch.asin, jacobian=jacobian, on_failure="warn")
    (gradient,) = torch.autograd.grad(y[[0, 2]].sum(), x)
    expected = (1 - x.detach()[[0, 2]] ** 2) ** -0.5
    torch.testing.assert_close(gradient[[0, 2]], expected)


# --- warnings point at the user's code ------------------------------------------------------------------


def assert_points_here(warning: warnings.WarningMessage, text: str) -> None:
    assert warning.filename == __file__
    assert text in linecache.getline(__file__, warning.lineno)


def test_convergence_warning_points_at_the_call() -> None:
    y0, s, b = failing_inputs(-1.0)
    with pytest.warns(inv.ConvergenceWarning) as record:
        inv.root(conditions, y0, args=(s, b), on_failure="warn")  # the line
    assert_points_here(record[0], "# the line")


def test_convergence_warning_of_a_layer_points_at_the_call() -> None:
    y0, s, b = failing_inputs(-1.0)
    layer = inv.RootLayer(conditions, on_failure="warn")
    with pytest.warns(inv.ConvergenceWarning) as record:
        layer(s, b, y0=y0)  # the line
    assert_points_here(record[0], "# the line")


class Stubborn(torch.autograd.Function):
    """y³ with a backward that reads numbers, as NumPy code does: no batched cotangent gets through."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.from_numpy(cotangent.detach().numpy() * 3 * y.detach().numpy() ** 2)


def test_performance_warning_points_at_the_backward() -> None:
    a = torch.tensor([[2.0, 10.0, 30.0]], requires_grad=True)
    solution = torch.tensor([[1.0, 2.0, 3.0]])
    conditions = lambda y, a: Stubborn.apply(y) + y - a  # noqa: E731
    y = inv.root(conditions, torch.ones(1, 3), args=a, solver=lambda y0, a: solution)
    with pytest.warns(inv.PerformanceWarning, match="row by row") as record:
        y.sum().backward()  # the line
    assert_points_here(record[0], "# the line")
    torch.testing.assert_close(a.grad, torch.tensor([[1 / 4, 1 / 13, 1 / 28]]))


# --- polish ---------------------------------------------------------------------------------------------


def loose(y0: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """The right answer, off by about 1e-3."""
    exact = opaque(s, b)
    return exact * (1 + 1e-3 * torch.linspace(-1, 1, exact.numel()).reshape(exact.shape))


def polished(
    polish: Any, solver: Any = loose, **keywords: Any
) -> tuple[Tensor, inv.SolveInfo, Tensor, Tensor]:
    y0, s, b = known()
    y, info = inv.root(
        conditions, y0, args=(s, b), solver=solver, polish=polish, return_info=True, **keywords
    )
    of_s, of_b = torch.autograd.grad(loss(y), (s, b))
    return y.detach(), info, of_s, of_b


def test_loose_solution_is_caught_without_polish() -> None:
    with pytest.raises(inv.ConvergenceError, match="8 of 8"):
        polished(0)


@pytest.mark.parametrize("polish", [2, 3, "auto"])
def test_polish_makes_a_loose_solution_exact(polish: Any) -> None:
    y, info, of_s, of_b = polished(polish)
    reference = polished(0, solver="torch.newton")
    assert float(info.residual.max()) <= (1e-10 if polish == 2 else 1e-14)
    for ours, exact in ((y, reference[0]), (of_s, reference[2]), (of_b, reference[3])):
        torch.testing.assert_close(ours, exact, rtol=1e-8 if polish == 2 else 1e-13, atol=0)


def test_loose_solution_has_a_loose_gradient() -> None:
    """What polish is for: accepted at 1e-2, the gradient is as wrong as the solution."""
    of_b, exact = polished(0, atol=1e-2)[3], polished("auto")[3]
    error = float(((of_b - exact).abs() / exact.abs()).max())
    assert 1e-4 < error < 1e-2


def test_polish_counts_the_steps_that_helped() -> None:
    _, info, _, _ = polished("auto")
    assert info.polish.shape == (BATCH,)
    assert bool(((info.polish >= 2) & (info.polish <= 5)).all())


@pytest.mark.parametrize("polish", [1, 4, "auto"])
def test_polish_never_makes_a_sample_worse(polish: Any) -> None:
    """Samples from which Newton's method runs away: arctan from 2, a cusp, an exact root, and NaN."""

    def f(y: Tensor) -> Tensor:
        return torch.where(torch.arange(4).reshape(4, 1) == 1, y.sign() * y.abs().sqrt(), y.atan())

    start = torch.tensor([[2.0], [0.5], [0.0], [torch.nan]])
    y, info = inv.root(
        f, torch.zeros(4, 1), solver=lambda y0: start, polish=polish, on_failure="zero_grad", return_info=True
    )
    assert bool((f(y).abs()[:3] <= f(start).abs()[:3]).all())
    assert torch.equal(y[2], start[2])
    assert bool(y[3].isnan().all())
    assert info.polish.tolist()[2:] == [0, 0]


def test_polish_leaves_neighbours_alone() -> None:
    y0, s, b = failing_inputs(torch.nan)
    keywords = {"solver": loose, "polish": 3, "on_failure": "zero_grad"}
    together = inv.root(conditions, y0, args=(s, b), **keywords)
    six = inv.root(
        conditions,
        y0[GOOD],
        args=(s, b[GOOD]),
        solver=lambda *_: loose(y0, s.detach(), b.detach())[GOOD],
        polish=3,
    )
    assert torch.equal(together[GOOD], six)


def test_polish_with_captured_tensors_and_under_vmap() -> None:
    _, s, b = known()
    y0 = torch.full((2,), 2.0)
    solver = lambda y0, b: loose(y0, s.detach(), b)  # noqa: E731
    y = vmap(lambda b: inv.root(lambda y, b: conditions(y, s, b), y0, args=b, solver=solver, polish="auto"))(
        b
    )
    expected = by_newton(torch.full((8, 2), 2.0), s, b)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)
    of_s = torch.autograd.grad(loss(y), s)
    torch.testing.assert_close(of_s, torch.autograd.grad(loss(expected), s), rtol=1e-13, atol=0)


@pytest.mark.parametrize("polish", [-1, 1.5, "always"])
def test_polish_takes_a_number_of_steps(polish: Any) -> None:
    with pytest.raises(inv.ConditionsError, match="accepted is a number of steps >= 0, or 'auto'"):
        polished(polish)


def test_polish_of_conditions_that_are_not_square_is_refused() -> None:
    x = torch.tensor([[1.0, 2.0]])
    with pytest.raises(inv.ConditionsError, match="2 equations for 3 unknowns"):
        inv.inverse(
            x, lambda x: torch.cat([x + 1e-7, x[:, :1] * 0], -1), f=lambda y: y[:, :2] + y[:, 2:], polish=1
        )


# --- tolerances -----------------------------------------------------------------------------------------


def judged(y: list[float], slope: float, **tolerances: float) -> list[bool]:
    """Which of the y are accepted as roots of slope · (y − 1)."""
    start = torch.tensor(y).unsqueeze(-1)
    keywords = {"solver": lambda y: y, "on_failure": "nan", "return_info": True, **tolerances}
    return inv.root(lambda y: slope * (y - 1), start, **keywords)[1].ok.tolist()


def test_small_residual_is_accepted() -> None:
    assert judged([1 + 1e-5, 1 + 1e-3, 5.0], 1e-2) == [True, False, False]
    assert judged([1 + 1e-5, 1 + 1e-3, 5.0], 1e-2, atol=1e-4) == [True, True, False]
    assert judged([1 + 1e-5, 1 + 1e-3, 5.0], 1e-2, atol=1.0) == [True, True, True]


@pytest.mark.parametrize("slope", [1e3, 1e9])
def test_residual_that_a_small_change_of_y_explains_is_accepted(slope: float) -> None:
    """In whatever units F comes: y is right to rtol."""
    assert judged([1 + 1e-7, 1 + 1e-5, 2.0], slope) == [True, False, False]
    assert judged([1 + 1e-7, 1 + 1e-5, 2.0], slope, rtol=1e-4) == [True, True, False]
    assert judged([1 + 1e-7, 1 + 1e-5, 1.0], slope, rtol=0.0, atol=1e-7) == [False, False, True]


@pytest.mark.parametrize(("dtype", "default"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_default_tolerance(dtype: torch.dtype, default: float) -> None:
    _, info = inv.root(lambda y: y - 1, torch.zeros(1, dtype=dtype), return_info=True)
    assert float(info.tolerance) == pytest.approx(default)


def test_info_of_a_good_solve() -> None:
    y, info = by_newton(*known(), return_info=True)
    assert info.status == (Status.CONVERGED,) * BATCH
    assert bool(info.ok.all())
    assert info.residual.shape == info.tolerance.shape == info.iterations.shape == (BATCH,)
    assert (info.solver, info.batch) == ("torch.newton", "batched")
    assert bool((info.iterations > 0).all())
    torch.testing.assert_close(
        info.residual, conditions(y, *known()[1:]).detach().abs().amax(-1), rtol=1, atol=1e-15
    )
