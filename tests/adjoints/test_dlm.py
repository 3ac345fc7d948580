"""``DLM``: a difference of gradients at a perturbed minimum, and how far it is off.

The oracle is the implicit adjoint. That the error falls with ε, at the rate that theory says, is the point:
a constant bias, as a Gauss–Newton step leaves, would show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import invlayer_core as inv
from invlayer_core.adjoints import DLM, Implicit

pytestmark = pytest.mark.usefixtures("float64")

x = torch.linspace(0, 3, 40, dtype=torch.float64)


def residuals(p: Tensor, data: Tensor) -> Tensor:
    a, b, c = p.unsqueeze(-1).unbind(-2)
    return a * torch.exp(-b * x.to(p)) + c - data


def objective(p: Tensor, data: Tensor) -> Tensor:
    return 0.5 * residuals(p, data).square().sum(-1)


@pytest.fixture
def data() -> Tensor:
    true = torch.tensor([2.0, 1.0, 0.5])
    return (residuals(true, torch.zeros(3, 40)) + 0.1 * torch.randn(3, 40)).requires_grad_()


def fit(adjoint: Any, data: Tensor, **keywords: Any) -> Tensor:
    start = torch.ones(*data.shape[:-1], 3, dtype=data.dtype)
    return inv.least_squares(residuals, start, data, adjoint=adjoint, **keywords)


def error(adjoint: Any, data: Tensor, **keywords: Any) -> float:
    cotangent = torch.linspace(-1, 2, 9).reshape(3, 3)
    found, exact = (
        torch.autograd.grad(fit(each, data, **keywords), data, cotangent)[0] for each in (adjoint, Implicit())
    )
    return float((found - exact).norm() / exact.norm())


# --- the bias -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolve", [False, True])
@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])
def test_error_falls_with_epsilon(data: Tensor, resolve: bool, central: bool, order: int) -> None:
    """ε = 1e-1, 1e-2, 1e-3: each time the error falls by 10, and by 100 where steps go to both sides."""
    errors = [error(DLM(10.0**-k, central=central, resolve=resolve), data) for k in (1, 2, 3)]
    for before, after in itertools.pairwise(errors):
        assert abs(math.log10(before / after) - order) < 0.2
    assert errors[-1] < (1e-5 if central else 1e-2)


def test_least_error(data: Tensor) -> None:
    """Rounding ε_mach/ε meets the bias ε² at ε = 1e-5: 1e-9 is left."""
    assert error(DLM(1e-5, central=True), data) < 2e-9


def test_gauss_newton_keeps_a_bias(data: Tensor) -> None:
    """Theseus' step has one that no ε takes away, where residuals remain; and none where they do not."""
    errors = [
        error(DLM(epsilon, central=True, hessian="gauss_newton"), data) for epsilon in (1e-2, 1e-3, 1e-4)
    ]
    assert min(errors) > 1e-3
    assert abs(errors[1] / errors[2] - 1) < 1e-2
    exact = residuals(torch.tensor([2.0, 1.0, 0.5]), torch.zeros(3, 40)).requires_grad_()
    assert error(DLM(1e-4, central=True, hessian="gauss_newton"), exact) < 1e-7


def test_scale_of_the_cotangent_does_not_matter(data: Tensor) -> None:
    y = fit(DLM(1e-2), data)
    small, large = (torch.autograd.grad(scale * y.sum(), data, retain_graph=True)[0] for scale in (1e-6, 1e6))
    torch.testing.assert_close(small * 1e12, large, rtol=1e-12, atol=0)


def test_zero_cotangent_gives_zero(data: Tensor) -> None:
    y = fit(DLM(1e-2), data)
    assert torch.equal(torch.autograd.grad(0 * y.sum(), data)[0], torch.zeros(3, 40))


# --- any solver -----------------------------------------------------------------------------------------

SOLVERS = [
    ("torch.levenberg_marquardt", {}),
    ("torch.lbfgs", {}),
    pytest.param("scipy.least_squares", {}, marks=pytest.mark.plugin("invlayer-scipy")),
]


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("resolve", [False, True])
def test_least_squares_solvers(data: Tensor, solver: str, options: dict[str, Any], resolve: bool) -> None:
    adjoint = DLM(1e-2, central=True, resolve=resolve)
    assert error(adjoint, data, solver=solver, options=options) < 3e-4


@pytest.mark.parametrize("resolve", [False, True])
def test_minimize(resolve: bool) -> None:
    a = torch.tensor([[2.0], [5.0]], requires_grad=True)
    f = lambda y, a: (y.exp() - a * y).sum(-1)  # noqa: E731
    y = inv.minimize(f, torch.zeros(2, 1), a, adjoint=DLM(1e-3, central=True, resolve=resolve))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], 1 / a.detach(), rtol=1e-6, atol=0)


def test_resolve_asks_for_no_hessian(data: Tensor) -> None:
    """An objective that can be differentiated once only."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, r: Tensor) -> Tensor:
            ctx.save_for_backward(r)
            return 0.5 * r.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * ctx.saved_tensors[0]

    once = lambda p, data: Once.apply(residuals(p, data)).sum(-1)  # noqa: E731
    start = torch.ones(3, 3)
    y = inv.minimize(once, start, data, adjoint=DLM(1e-2, central=True, resolve=True))
    exact = inv.minimize(objective, start, data)
    found, expected = (torch.autograd.grad(each.sum(), data)[0] for each in (y, exact))
    assert float((found - expected).norm() / expected.norm()) < 3e-4


def test_jacobian_and_hessian_of_the_user(data: Tensor) -> None:
    def jacobian(p: Tensor, data: Tensor) -> Tensor:
        decay = torch.exp(-p[..., 1:2] * x)
        return torch.stack([decay, -p[..., :1] * x * decay, torch.ones_like(decay)], -1)

    assert error(DLM(1e-2, central=True, resolve=True), data, jacobian=jacobian) < 3e-4
    assert error(DLM(1e-4, central=True, hessian="gauss_newton"), data, jacobian=jacobian) < 1e-1


def test_captured_parameters() -> None:
    weight, data = torch.nn.Parameter(torch.tensor([1.0, 0.5])), torch.randn(3, 2)
    run = lambda each: inv.minimize(  # noqa: E731
        lambda y: ((y - data) ** 2 * weight.exp() + y**4).sum(-1), torch.zeros(3, 2), adjoint=each
    )
    found, expected = (
        torch.autograd.grad(run(each).pow(3).sum(), weight)[0]
        for each in (DLM(1e-4, central=True), Implicit())
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_float32_is_differentiated_in_float64(data: Tensor) -> None:
    """At ε = 1e-4 single precision would leave a relative error of about 1e-3."""
    single = data.detach().float().requires_grad_()
    y = fit(DLM(1e-4, central=True), single, options={"xtol": 1e-4})
    (found,) = torch.autograd.grad(y.sum(), single)
    assert y.dtype == found.dtype == torch.float32
    (exact,) = torch.autograd.grad(fit(Implicit(), data).sum(), data)
    assert float((found - exact).norm() / exact.norm()) < 3e-4


# --- transforms, failed samples -------------------------------------------------------------------------


@pytest.mark.parametrize("resolve", [False, True])
def test_reverse_transforms(data: Tensor, resolve: bool) -> None:
    adjoint, rows = DLM(1e-3, central=True, resolve=resolve), data.detach()
    close = {"rtol": 1e-4, "atol": 1e-5}
    ours, theirs = (jacrev(lambda d, each=each: fit(each, d))(rows[0]) for each in (adjoint, Implicit()))
    torch.testing.assert_close(ours, theirs, **close)
    ours, theirs = (
        vmap(grad(lambda d, each=each: fit(each, d).pow(2).sum()))(rows) for each in (adjoint, Implicit())
    )
    torch.testing.assert_close(ours, theirs, **close)


def _double_backward(data: Tensor) -> Any:
    (first,) = torch.autograd.grad(fit(DLM(), data).sum(), data, create_graph=True)
    return torch.autograd.grad(first.sum(), data)


@pytest.mark.parametrize(
    "second", [_double_backward, lambda data: jacrev(jacrev(lambda d: fit(DLM(), d)))(data.detach()[0])]
)
def test_second_derivatives_are_refused(data: Tensor, second: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        inv.UnsupportedTransformError, match=r"a second derivative through adjoint=DLM\(epsilon=0.01"
    ):
        second(data)


@pytest.mark.parametrize(
    "forward",
    [
        lambda f, a: jvp(f, (a,), (a,)),
        lambda f, a: jacfwd(f)(a),
        lambda f, a: hessian(lambda a: f(a).sum())(a),
        lambda f, a: jacfwd(jacfwd(f))(a),
    ],
)
def test_forward_mode_is_refused(data: Tensor, forward: Callable[..., Any]) -> None:
    with pytest.raises(inv.UnsupportedTransformError, match=r"through adjoint=DLM\(.*adjoint=Implicit\(\)"):
        forward(lambda d: fit(DLM(), d), data.detach()[0])


@pytest.mark.parametrize("policy", ["nan", "zero_grad"])
def test_failed_sample_stays_by_itself(data: Tensor, policy: Any) -> None:
    with torch.no_grad():
        data[1, 3] = torch.nan
    found = []
    for each in (DLM(1e-4, central=True), Implicit()):
        y = fit(each, data, on_failure=policy)
        found.append(
            (
                torch.autograd.grad(y[::2].sum(), data, retain_graph=True)[0],
                torch.autograd.grad(y.sum(), data)[0],
            )
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_epsilon_is_checked(epsilon: float) -> None:
    with pytest.raises(inv.ConditionsError, match=r"DLM\(epsilon=.*\): accepted is a number above 0"):
        DLM(epsilon)


def test_hessian_is_checked() -> None:
    with pytest.raises(inv.ConditionsError, match=r"DLM\(hessian='bfgs'\): accepted are 'full' and"):
        DLM(hessian="bfgs")  # type: ignore[arg-type]
    with pytest.raises(inv.ConditionsError, match="no use for a Hessian"):
        DLM(resolve=True, hessian="gauss_newton")


def test_other_kinds_are_refused(data: Tensor) -> None:
    a = torch.ones(2, requires_grad=True)
    with pytest.raises(
        inv.ConditionsError, match=r"perturbs an objective, .* have none. Accepted are minimize"
    ):
        inv.root(lambda y, a: y**3 - a, torch.ones(2), a, adjoint=DLM())
    with pytest.raises(inv.ConditionsError, match="came with minimize, whose objective has no residuals"):
        inv.minimize(objective, torch.ones(3, 3), data, adjoint=DLM(hessian="gauss_newton"))


def test_function_of_your_own_cannot_be_resolved(data: Tensor) -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"which cannot be given another objective. Accepted is a reg"
    ):
        fit(DLM(resolve=True), data, solver=lambda y0, data: y0)


def test_perturbed_problem_that_was_not_solved_is_told(data: Tensor) -> None:
    """A solver that stops at ‖∇f‖ = 1e-3 says nothing about a push of 1e-6."""
    y = fit(DLM(1e-6, resolve=True), data, solver="torch.lbfgs", options={"gtol": 1e-3}, atol=1e-2)
    with pytest.warns(
        inv.ConvergenceWarning, match=r"perturbed problems of samples \[0.*were solved to .*e-"
    ):
        torch.autograd.grad(y.sum(), data)
