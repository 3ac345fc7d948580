"""SciPy's minimisers: every method, its options, bounds and constraints, and the derivative behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_scipy.options import MINIMIZE_OPTIONS

pytestmark = pytest.mark.plugin("invlayer-scipy")

METHODS = sorted(MINIMIZE_OPTIONS)
# What a method reaches without derivatives, or stops at for rounding in the objective.
ERROR = {"cobyla": 1e-6, "cobyqa": 1e-6, "nelder-mead": 1e-6, "powell": 1e-6, "slsqp": 1e-6}


def objective(y: Tensor, a: Tensor) -> Tensor:
    """Σ cosh(y₁ − a₁) + ½ (y₂ − y₁ a₂)²."""
    return torch.cosh(y[..., 0] - a[..., 0]) + 0.5 * (y[..., 1] - y[..., 0] * a[..., 1]).square()


def exact(a: Tensor) -> Tensor:
    return torch.stack([a[..., 0], a[..., 0] * a[..., 1]], -1)


def args(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 2, generator=generator, dtype=torch.float64)


def solve(a: Tensor, **keywords: Any) -> Any:
    tolerant = {"atol": 1e-5, "rtol": 1e-4}
    y0 = torch.zeros_like(a)
    return inv.minimize(objective, y0, a, solver="scipy.minimize", **{**tolerant, **keywords})


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    a = args().requires_grad_()
    y, info = solve(a, options={"method": method}, return_info=True)
    assert bool(info.ok.all())
    assert bool((info.iterations > 0).all())
    torch.testing.assert_close(y, exact(a), rtol=0, atol=ERROR.get(method, 1e-7))
    (found,) = torch.autograd.grad(y.sum(), a)
    (expected,) = torch.autograd.grad(exact(a).sum(), a)
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * ERROR.get(method, 1e-7))


@pytest.mark.parametrize("batch", ["serial", "threads", "lockstep"])
@pytest.mark.parametrize("method", ["bfgs", "trust-exact", "nelder-mead"])
def test_ways_of_running_a_batch(method: str, batch: str) -> None:
    a = args(5)
    found = solve(a, options={"method": method}, batch=batch)
    assert torch.equal(found, solve(a, options={"method": method}, batch="serial"))


def test_a_method_that_holds_a_lock_does_not_run_in_lockstep() -> None:
    a = args(5)
    y, info = solve(a, options={"method": "cobyqa"}, return_info=True)
    assert (info.batch, info.batch_reason) == ("serial", "the solver holds a lock while it asks for F")
    threads = solve(a, options={"method": "cobyqa"}, batch="threads")
    assert torch.equal(threads, y)
    with pytest.raises(inv.ConditionsError, match=r"holds a lock while it asks for F.*Accepted are"):
        solve(a, options={"method": "cobyqa"}, batch="lockstep")


@pytest.mark.parametrize("jac", [True, False])
def test_gradient_by_differences(jac: bool) -> None:
    a = args()
    y, info = solve(a, options={"method": "bfgs", "jac": jac}, return_info=True)
    torch.testing.assert_close(y, exact(a), rtol=0, atol=1e-6)
    assert all(aux["nfev"] > (8 if not jac else 1) for aux in info.aux)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "steepest"}, ValueError, "unknown method 'steepest'; accepted are"),
        ({"method": "bfgs", "ftol": 1e-9}, TypeError, r"unknown options \['ftol'\]; accepted are"),
        ({"method": "nelder-mead", "jac": True}, ValueError, "takes no gradient"),
        ({"method": "dogleg", "jac": False}, ValueError, "needs the gradient"),
        ({"method": "bfgs", "jac": "2-point"}, TypeError, "accepted are True"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises((error, inv.ConvergenceError), match=match):
        solve(args(), options=options)


def test_tighter_than_scipy_unless_told_otherwise() -> None:
    a = args()
    loose = solve(a, options={"method": "bfgs", "gtol": 1e-2}, on_failure="warn", atol=1.0)
    assert bool(((loose - exact(a)).abs() > 1e-7).any())


# --- constraints ----------------------------------------------------------------------------------------


def projection(p: Tensor, **keywords: Any) -> Any:
    """The point of the disc |y| ≤ 1 nearest to p; a linear equation and bounds beside."""
    return inv.nlp(
        lambda y, p: 0.5 * (y - p).square().sum(-1),
        torch.full_like(p, 0.1),
        p,
        ineq=lambda y, p: 1 - y.square().sum(-1, keepdim=True),
        solver="scipy.minimize",
        **keywords,
    )


@pytest.mark.parametrize("method", ["slsqp", "trust-constr", "cobyla", "cobyqa"])
def test_constrained_methods(method: str) -> None:
    p = torch.tensor([[2.0, 1.0], [0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    y, multipliers = projection(p, options={"method": method}, return_multipliers=True, atol=1e-5)
    inside = p / p.norm(dim=-1, keepdim=True).clamp_min(1.0)
    torch.testing.assert_close(y, inside, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        multipliers.inequalities, (p.norm(dim=-1, keepdim=True) - 1).clamp_min(0) / 2, rtol=0, atol=1e-9
    )
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad((y * weights).sum(), p)
    (expected,) = torch.autograd.grad((inside * weights).sum(), p)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["slsqp", "trust-constr", "cobyqa"])
def test_everything_at_once(method: str) -> None:
    """min ½|y − p|² on Σy = 1, y₁ ≤ 0.3, y ≥ 0: by hand, y = (0.3, 0.7 + (p₂ − p₃)/2 …)."""
    p = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    y = inv.nlp(
        lambda y, p: 0.5 * (y - p).square().sum(-1),
        torch.full_like(p, 1 / 3),
        p,
        eq=lambda y, p: y.sum(-1) - 1,
        ineq=lambda y, p: 0.3 - y[..., 0],
        bounds=(0.0, None),
        solver="scipy.minimize",
        options={"method": method},
        atol=1e-5,
    )
    expected = torch.stack([torch.full((), 0.3), 0.35 + (p[1] - p[2]) / 2, 0.35 - (p[1] - p[2]) / 2])
    torch.testing.assert_close(y, expected.double(), rtol=0, atol=1e-7)
    (found,) = torch.autograd.grad(y[1], p)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs-b", "nelder-mead"])
def test_methods_without_constraints_say_so(method: str) -> None:
    p = torch.tensor([2.0, 1.0], dtype=torch.float64)
    with pytest.raises((ValueError, inv.ConvergenceError), match="takes no constraints; accepted"):
        projection(p, options={"method": method})


def test_methods_without_bounds_say_so() -> None:
    p = torch.tensor([2.0, 1.0], dtype=torch.float64)
    with pytest.raises((ValueError, inv.ConvergenceError), match="takes no bounds; accepted"):
        inv.nlp(
            lambda y, p: (y - p).square().sum(-1), torch.zeros_like(p), p,
            bounds=(0.0, 1.0), solver="scipy.minimize", options={"method": "bfgs"},
        )  # fmt: skip


@pytest.mark.parametrize("batch", ["serial", "lockstep"])
def test_bounds_of_each_sample(batch: str) -> None:
    p = torch.tensor([[2.0, -1.0], [0.5, 0.4], [3.0, 3.0]], dtype=torch.float64)
    upper = torch.tensor([[1.0], [0.45], [2.0]], dtype=torch.float64).expand(3, 2).clone().requires_grad_()
    y = inv.nlp(
        lambda y, p: 0.5 * (y - p).square().sum(-1), torch.zeros_like(p), p,
        bounds=(0.0, upper), solver="scipy.minimize", batch=batch,
    )  # fmt: skip
    torch.testing.assert_close(y, torch.minimum(p, upper).clamp_min(0.0), rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(y.sum(), upper)
    assert found.tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]


# --- one unknown, and least squares ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "golden"}, {"method": "bounded", "bounds": (-3.0, 3.0)}, {"bracket": (-1.0, 0.5)}],
    ids=str,
)
def test_minimize_scalar(options: dict[str, Any]) -> None:
    a = args()[:, :1].requires_grad_()
    y = inv.minimize(
        lambda y, a: torch.cosh(y - a).sum(-1), torch.zeros_like(a), a,
        solver="scipy.minimize_scalar", options=options, atol=1e-4, polish=2,
    )  # fmt: skip
    torch.testing.assert_close(y, a, rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(found, torch.ones_like(a), rtol=0, atol=1e-9)


TIMES = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)


def decay(y: Tensor, data: Tensor) -> Tensor:
    return y[..., :1] * torch.exp(-y[..., 1:] * TIMES) - data


DIFFERENCES = {
    "trf": (True, "2-point", "3-point"),
    "dogbox": (True, "2-point", "3-point"),
    "lm": (True, "2-point"),
}


@pytest.mark.parametrize(
    ("method", "jac"), [(name, jac) for name, kinds in DIFFERENCES.items() for jac in kinds]
)
def test_least_squares(method: str, jac: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.exp(-0.7 * TIMES) + 0.2 * torch.randn(3, 9, generator=generator, dtype=torch.float64)
    data.requires_grad_()
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64).expand(3, 2)
    fit = lambda data: inv.least_squares(  # noqa: E731
        decay, y0, data, solver="scipy.least_squares", options={"method": method, "jac": jac}, polish=3
    )
    y = fit(data)
    stationary = torch.autograd.functional.jacobian(
        lambda y: decay(y, data.detach()).square().sum() / 2, y.detach()
    )
    assert bool((stationary.abs() < 1e-12).all())
    assert torch.autograd.gradcheck(fit, data, rtol=1e-6)


def test_robust_losses_are_refused() -> None:
    data = torch.exp(-0.7 * TIMES)
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    with pytest.raises((ValueError, inv.ConvergenceError), match="another objective than the one"):
        inv.least_squares(decay, y0, data, solver="scipy.least_squares", options={"loss": "huber"})


def test_user_jacobian_goes_to_the_solver() -> None:
    calls = []

    def jacobian(y: Tensor, data: Tensor) -> Tensor:
        calls.append(tuple(y.shape))
        e = torch.exp(-y[..., 1:] * TIMES)
        return torch.stack([e, -y[..., :1] * TIMES * e], -1)

    data = torch.exp(-0.7 * TIMES) + 0.1 * torch.cos(5 * TIMES)
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    keywords: dict[str, Any] = {"solver": "scipy.least_squares"}
    y = inv.least_squares(decay, y0, data, jacobian=jacobian, **keywords)
    assert calls
    torch.testing.assert_close(y, inv.least_squares(decay, y0, data, **keywords), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("wrong", [lambda y: y.square(), lambda y: y.square().sum(-1, keepdim=True)])
def test_an_objective_that_is_no_number_is_refused(wrong: Any, batch: tuple[int, ...]) -> None:
    y0 = torch.ones(*batch, 2, dtype=torch.float64)
    with pytest.raises(
        inv.ConditionsError, match=r"objective returned shape \(\d,\).*accepted is one real number"
    ):
        inv.minimize(wrong, y0, solver="scipy.minimize")
