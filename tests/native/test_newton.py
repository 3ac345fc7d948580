"""``torch.newton``: its options, its line search, and that samples go their own ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_core import BatchProblem, Status, get_solver

pytestmark = pytest.mark.usefixtures("float64")


def solve(f: Any, y0: Tensor, **options: Any) -> tuple[Tensor, inv.SolveInfo]:
    return inv.root(f, y0, options=options, on_failure="nan", return_info=True)


def rosenbrock(y: Tensor) -> Tensor:
    first, second = y.unbind(-1)
    return torch.stack([10 * (second - first**2), 1 - first], -1)


# --- the method -----------------------------------------------------------------------------------------


def test_converges_quadratically() -> None:
    """From 1.5 to √2 the error is squared each time: 9e-2, 2e-3, 2e-6, 2e-12, 0."""
    errors = []
    for k in range(1, 5):
        y = inv.root(lambda y: y**2 - 2, torch.tensor([1.5]), options={"maxiter": k}, atol=1.0)
        errors.append(abs(float(y) - 2**0.5))
    assert errors[0] < 3e-3
    assert errors[1] < 3e-6
    assert errors[2] < 3e-12
    assert errors[3] <= 3e-16


@pytest.mark.parametrize("start", [[-1.2, 1.0], [10.0, -10.0], [1.0, 1.0]])
def test_rosenbrock(start: list[float]) -> None:
    y, info = solve(rosenbrock, torch.tensor(start))
    torch.testing.assert_close(y, torch.ones(2), rtol=1e-15, atol=0)
    assert int(info.iterations) <= 30


@pytest.mark.parametrize("start", [1.5, 3.0, 10.0, -30.0])
def test_line_search_tames_arctan(start: float) -> None:
    """Full Newton steps on arctan run away from beyond 1.39."""
    y, info = solve(torch.atan, torch.tensor([start]))
    assert abs(float(y)) < 1e-12
    assert bool(info.ok)
    y, _ = solve(torch.atan, torch.tensor([start]), backtracks=0, maxiter=30)
    assert not abs(float(y)) < 1


def test_line_search_keeps_out_of_forbidden_ground() -> None:
    """log y at a full step from 3 is the log of a negative number."""
    y, _ = solve(lambda y: y.log(), torch.tensor([3.0]))
    torch.testing.assert_close(y, torch.ones(1), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("f", "start", "root"),
    [
        (lambda y: y**2 - 2 * y, [1.0], None),
        (lambda y: y**3 - 1, [0.0], 1.0),
        (lambda y: torch.stack([y[..., 0] ** 2 - 1, y[..., 1] - 3], -1), [0.0, 0.0], None),
        (lambda y: y.sum(-1, keepdim=True) * torch.ones(2) - 1, [0.0, 0.0], None),
    ],
    ids=["stationary", "inflection", "zero column", "rank one everywhere"],
)
def test_singular_start_never_ends_in_a_lie(f: Any, start: list[float], root: float | None) -> None:
    """Found or not, the verdict is the measured one, and nothing is NaN."""
    y, info = inv.root(f, torch.tensor(start), on_failure="zero_grad", return_info=True)
    assert bool(y.isfinite().all())
    assert bool(info.ok) == bool((f(y).abs() <= info.tolerance).all())


def test_redundant_equations_are_solved_all_the_same() -> None:
    y, info = solve(lambda y: y.sum(-1, keepdim=True) * torch.ones(2) - 1, torch.zeros(2))
    assert bool(info.ok)
    assert abs(float(y.sum()) - 1) < 1e-9


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_of_the_unknowns_does_not_matter(scale: float) -> None:
    """The step is measured beside y: tiny roots get their digits too."""
    y, info = solve(lambda y: (y / scale) ** 3 + y / scale - 1, torch.zeros(1))
    root = torch.tensor([0.6823278038280193])
    torch.testing.assert_close(y / scale, root, rtol=1e-15, atol=0)
    assert int(info.iterations) <= 12


@pytest.mark.parametrize(
    "f",
    [
        lambda y: y**3 + y,
        lambda y: y.sin() + y.exp() - 1,
        lambda y: y.sin() + 0.3 * y.flip(-1) ** 2 + (y.cos() - 1),
    ],
    ids=["cubic", "exponential", "coupled"],
)
def test_root_at_zero_does_not_take_for_ever(f: Any) -> None:
    """No step is small beside y = 0; the residual has to end the iteration."""
    y, info = solve(f, torch.full((2,), 0.3))
    assert bool((y.abs() < 1e-15).all())
    assert int(info.iterations) <= 15


def test_float32() -> None:
    y, info = solve(lambda y: y**3 + y - 1, torch.zeros(3, 1, dtype=torch.float32))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.full((3, 1), 0.6823278, dtype=torch.float32), rtol=1e-6, atol=0)
    assert bool((info.iterations <= 10).all())


# --- options --------------------------------------------------------------------------------------------


def test_maxiter_is_kept_and_told() -> None:
    with pytest.raises(
        inv.ConvergenceError, match=r"NOT_CONVERGED, the solver gave up.*torch.newton with maxiter=2"
    ) as caught:
        inv.root(rosenbrock, torch.tensor([-1.2, 1.0]), options={"maxiter": 2})
    assert int(caught.value.info.iterations) == 2


@pytest.mark.parametrize("xtol", [1e-1, 1e-3])
def test_xtol_ends_earlier(xtol: float) -> None:
    f = lambda y: y.exp() - 5  # noqa: E731
    loose, tight = solve(f, torch.zeros(1), xtol=xtol)[1], solve(f, torch.zeros(1))[1]
    assert int(loose.iterations) < int(tight.iterations)


def test_unknown_option_is_named() -> None:
    with pytest.raises(
        TypeError,
        match=r"torch.newton: unknown options \['tol'\]; accepted are \['backtracks', 'check_every', 'max",
    ):
        inv.root(rosenbrock, torch.zeros(2), options={"tol": 1e-9})


@pytest.mark.parametrize("options", [{"maxiter": 0}, {"maxiter": 1, "backtracks": 0}])
def test_extreme_options(options: dict[str, int]) -> None:
    y, info = inv.root(
        rosenbrock, torch.tensor([-1.2, 1.0]), options=options, on_failure="zero_grad", return_info=True
    )
    assert not bool(info.ok)
    assert int(info.iterations) == options["maxiter"]
    assert bool(y.isfinite().all())


def test_options_are_left_as_they_were() -> None:
    options = {"maxiter": 50}
    inv.root(rosenbrock, torch.zeros(2), options=options)
    assert options == {"maxiter": 50}


# --- one batch, many paths ------------------------------------------------------------------------------


def mixed(y: Tensor, kind: Tensor) -> Tensor:
    """Easy, far away, without a root, singular at the start, NaN: one of each, elementwise."""
    return torch.where(
        kind == 0,
        y**3 + y - 1,
        torch.where(kind == 1, y.atan(), torch.where(kind == 2, y**2 + 1, y**2 - 2 * y)),
    )


STARTS = torch.tensor([[0.0], [20.0], [0.7], [1.0], [torch.nan], [5.0]], dtype=torch.float64)
KINDS = torch.tensor([[0], [1], [2], [3], [0], [0]])


def mixed_roots(rows: Any) -> tuple[Tensor, inv.SolveInfo]:
    keywords = {"options": {"maxiter": 25}, "on_failure": "zero_grad", "return_info": True}
    return inv.root(mixed, STARTS[rows], args=KINDS[rows], **keywords)


def test_each_sample_goes_as_if_alone() -> None:
    together, info = mixed_roots(slice(None))
    for i in range(len(STARTS)):
        alone, of_one = mixed_roots(slice(i, i + 1))
        assert torch.equal(together[i].nan_to_num(9.0), alone[0].nan_to_num(9.0))
        assert int(info.iterations[i]) == int(of_one.iterations[0])
        assert info.status[i] is of_one.status[0]
    assert [status is Status.CONVERGED for status in info.status] == [True, True, False, False, False, True]


def test_order_of_samples_does_not_matter() -> None:
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    straight, shuffled = mixed_roots(slice(None))[0], mixed_roots(order)[0]
    assert torch.equal(shuffled.nan_to_num(9.0), straight[order].nan_to_num(9.0))


def test_finished_samples_rest() -> None:
    """What has converged stays where it is, bit by bit, while others go on."""
    f = lambda y, a: y**2 - a  # noqa: E731
    a = torch.tensor([[4.0], [1e12]])
    alone, of_one = inv.root(f, torch.tensor([[2.1]]), args=a[:1], return_info=True)
    both, of_both = inv.root(f, torch.tensor([[2.1], [1.0]]), args=a, return_info=True)
    assert torch.equal(alone[0], both[0])
    assert int(of_both.iterations[0]) == int(of_one.iterations[0]) < int(of_both.iterations[1])


# --- the adapter itself ---------------------------------------------------------------------------------


def test_solver_is_found_through_the_hook_and_has_no_state() -> None:
    solver = get_solver("torch.newton")
    assert solver is get_solver("torch.newton")
    assert not vars(solver)
    assert solver.batched


def test_called_directly() -> None:
    problem = BatchProblem("root", 1, 2, lambda y: y**2 - 2, lambda y: 2 * y.unsqueeze(-1))
    result = get_solver("torch.newton").solve(problem, torch.tensor([[1.0], [3.0]]), {})
    torch.testing.assert_close(result.y, torch.full((2, 1), 2**0.5), rtol=1e-15, atol=0)
    assert result.success.tolist() == [True, True]


def test_jacobian_of_the_user_is_used() -> None:
    calls = []

    def jacobian(y: Tensor, a: Tensor) -> Tensor:
        calls.append(y.shape)
        return torch.diag_embed(2 * y)

    a = torch.tensor([[2.0, 3.0]], requires_grad=True)
    y = inv.root(lambda y, a: y**2 - a, torch.ones(1, 2), args=a, jacobian=jacobian)
    forward = len(calls)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert 3 <= forward < len(calls)
    torch.testing.assert_close(gradient, 0.5 * a.detach() ** -0.5)


def test_wrong_jacobian_of_the_user_is_refused() -> None:
    a = torch.tensor([[2.0, 3.0]], requires_grad=True)
    y = inv.root(
        lambda y, a: y**2 - a, torch.ones(1, 2), args=a, jacobian=lambda y, a: torch.diag_embed(2.1 * y)
    )
    with pytest.raises(
        inv.ConditionsError, match="jacobian= is not the Jacobian of the conditions: in sample 0"
    ):
        y.sum().backward()
