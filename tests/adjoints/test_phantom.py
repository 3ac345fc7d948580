"""``Phantom``: the Neumann series cut off, and nothing beyond a first derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import invlayer_core as inv
from invlayer_core.adjoints import Implicit, Phantom

pytestmark = pytest.mark.usefixtures("float64")

W = torch.tensor([[0.4, -0.3], [0.2, 0.5]], dtype=torch.float64)


def contraction(y: Tensor, a: Tensor) -> Tensor:
    return torch.tanh(y @ W.T) + a


def layer(adjoint: Any, a: Tensor) -> Tensor:
    return inv.fixed_point(contraction, torch.zeros_like(a), a, adjoint=adjoint)


def by_hand(y: Tensor, steps: int, damping: float) -> Tensor:
    """λ (I + M + … + Mᵏ⁻¹), M = I − λ (I − ∂T/∂y), for ∂T/∂θ = I."""
    identity = torch.eye(2)
    M = identity - damping * (identity - (1 - torch.tanh(W @ y) ** 2).unsqueeze(-1) * W)
    return damping * sum(torch.linalg.matrix_power(M, k) for k in range(steps))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_series(steps: int, damping: float) -> None:
    a = torch.randn(2)
    expected = by_hand(layer(Implicit(), a), steps, damping)
    for transform in (jacrev, jacfwd):
        found = transform(lambda a: layer(Phantom(steps, damping), a))(a)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_many_steps_are_the_exact_derivative(damping: float) -> None:
    a = torch.randn(3, 2, requires_grad=True)
    found, expected = (
        torch.autograd.grad(layer(each, a).pow(2).sum(), a)[0] for each in (Phantom(200, damping), Implicit())
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def linear_fit(kind: str, scale: float | Tensor = 1.0) -> tuple[Tensor, Callable[[Any, Tensor], Tensor]]:
    """f = ½ c ‖B y − a‖²: B, and the minimum as a function of a."""
    B = torch.randn(4, 2)
    root = torch.as_tensor(scale).sqrt()
    residuals = lambda y, a: root * (y @ B.T - a)  # noqa: E731
    objective = lambda y, a: 0.5 * residuals(y, a).square().sum(-1)  # noqa: E731
    solver = lambda y0, a: a @ torch.linalg.pinv(B).T  # noqa: E731
    solve: Callable[..., Tensor] = {"minimize": inv.minimize, "least_squares": inv.least_squares}[kind]
    posed = objective if kind == "minimize" else residuals

    def minimum(adjoint: Any, a: Tensor) -> Tensor:
        return solve(posed, a.new_zeros(*a.shape[:-1], 2), a, solver=solver, adjoint=adjoint)

    return B, minimum


KINDS = pytest.mark.parametrize("kind", ["minimize", "least_squares"])


@KINDS
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_gradient_steps(kind: str, damping: float) -> None:
    """Pushed by λ Bᵀ, k steps give λ Σ (I − λ BᵀB)ʲ Bᵀ; and λ is the damping over about ‖BᵀB‖."""
    B, minimum = linear_fit(kind)
    a = torch.randn(4)
    one, three = (jacrev(lambda a, k=k: minimum(Phantom(k, damping), a))(a) for k in (1, 3))
    length = float((one / B.T).mean())
    torch.testing.assert_close(one, length * B.T, rtol=1e-12, atol=0)
    assert damping <= length * float(torch.linalg.matrix_norm(B, 2)) ** 2 < 1.2 * damping
    M = torch.eye(2) - length * B.T @ B
    torch.testing.assert_close(three, length * (torch.eye(2) + M + M @ M) @ B.T, rtol=1e-12, atol=1e-12)


@KINDS
@pytest.mark.parametrize("scale", [1e-8, 1e6, 1e12])
def test_scale_of_the_objective_does_not_matter(kind: str, scale: float) -> None:
    """c f has the minimum of f. With plain steps of length 1 the series would run off as (c ‖H‖)ᵏ."""
    a, found = torch.randn(4), []
    for c in (1.0, scale):
        torch.manual_seed(3)
        minimum = linear_fit(kind, c)[1]
        found.append(jacrev(lambda a, minimum=minimum: minimum(Phantom(5), a))(a))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@KINDS
def test_each_sample_has_a_scale_of_its_own(kind: str) -> None:
    """Many steps are the exact derivative for all; and few are those of a sample alone."""
    scale = torch.tensor([[1e-6], [1.0], [1e6]])
    B, minimum = linear_fit(kind, scale)
    a = torch.randn(3, 4, requires_grad=True)
    (found,) = torch.autograd.grad(minimum(Phantom(400), a).sum(), a)
    expected = torch.linalg.pinv(B).sum(0).expand(3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.manual_seed(0)
    (few,) = torch.autograd.grad(minimum(Phantom(2), a).sum(), a)
    torch.testing.assert_close(few[0], few[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(few[0], few[2], rtol=1e-9, atol=1e-9)


def test_mapped_minimum() -> None:
    _, minimum = linear_fit("minimize")
    a = torch.randn(3, 4)
    one = jacrev(lambda a: minimum(Phantom(2), a))
    torch.testing.assert_close(vmap(one)(a), torch.stack([one(row) for row in a]), rtol=1e-13, atol=1e-13)
    leaf = a.clone().requires_grad_()
    (found,) = torch.autograd.grad(minimum(Phantom(2), leaf).sum(), leaf)
    torch.testing.assert_close(found, vmap(one)(a).sum(1), rtol=1e-12, atol=1e-12)


def test_minimum_of_what_reads_no_unknown() -> None:
    """Without curvature there is no length to go by, and nothing to gain."""
    a = torch.randn(2, requires_grad=True)
    y = inv.minimize(lambda y, a: a.sum(-1), torch.zeros(2), a, adjoint=Phantom())
    assert torch.equal(torch.autograd.grad(y.sum(), a, materialize_grads=True)[0], torch.zeros(2))


def test_eager_forward_mode() -> None:
    a, tangent = torch.randn(2), torch.randn(2)
    with forward_ad.dual_level():
        y = layer(Phantom(3), forward_ad.make_dual(a, tangent))
        found = forward_ad.unpack_dual(y).tangent
    expected = by_hand(layer(Implicit(), a), 3, 1.0) @ tangent
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_captured_parameters_and_value() -> None:
    weight = torch.nn.Parameter(W.clone())
    a = torch.randn(3, 2)
    run = lambda each: inv.fixed_point(  # noqa: E731
        lambda y, a: torch.tanh(y @ weight.T) + a, torch.zeros(3, 2), a, adjoint=each
    )
    assert torch.equal(run(Phantom()), run(Implicit()))
    found, expected = (torch.autograd.grad(run(each).sum(), weight)[0] for each in (Phantom(200), Implicit()))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_vmap() -> None:
    a = torch.randn(3, 2)
    one = lambda a: layer(Phantom(3), a)  # noqa: E731
    expected = torch.stack([jacrev(one)(row) for row in a])
    torch.testing.assert_close(vmap(jacrev(one))(a), expected, rtol=1e-13, atol=1e-13)


def test_failed_sample_stays_by_itself() -> None:
    a = torch.tensor([[0.5, 0.1], [torch.nan, 0.0]], requires_grad=True)
    y = inv.fixed_point(contraction, torch.zeros(2, 2), a, adjoint=Phantom(2), on_failure="nan")
    (good,) = torch.autograd.grad(y[0].sum(), a, retain_graph=True)
    expected = by_hand(y[0].detach(), 2, 1.0).sum(0)
    torch.testing.assert_close(good, torch.stack([expected, torch.zeros(2)]), rtol=1e-12, atol=1e-12)
    assert bool(torch.autograd.grad(y.sum(), a)[0][1].isnan().all())


def _double_backward(a: Tensor) -> Any:
    (first,) = torch.autograd.grad(layer(Phantom(), a).sum(), a, create_graph=True)
    return torch.autograd.grad(first.sum(), a)


def _forward_over_reverse(a: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, torch.ones_like(a))
        tangent = forward_ad.unpack_dual(layer(Phantom(), dual)).tangent
        return torch.autograd.grad(tangent.sum(), a)


@pytest.mark.parametrize(
    "second",
    [
        _double_backward,
        _forward_over_reverse,
        lambda a: hessian(lambda a: layer(Phantom(), a).sum())(a.detach()),
        lambda a: jacfwd(jacfwd(lambda a: layer(Phantom(), a)))(a.detach()),
        lambda a: jacrev(jacfwd(lambda a: layer(Phantom(), a)))(a.detach()),
        lambda a: jacrev(lambda a: jvp(lambda a: layer(Phantom(), a), (a,), (a,))[1])(a.detach()),
    ],
)
def test_second_derivatives_are_refused(second: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        inv.UnsupportedTransformError,
        match=r"a second derivative through adjoint=Phantom\(steps=1.*take adjoint=Implicit",
    ):
        second(torch.randn(2, requires_grad=True))


def test_problem_without_a_step_is_refused() -> None:
    a = torch.ones(2, requires_grad=True)
    with pytest.raises(
        inv.ConditionsError, match=r"needs a step.*'.*lambda.*' do not say which. Accepted are fixed_point"
    ):
        inv.root(lambda y, a: y**3 - a, torch.ones(2), a, adjoint=Phantom())


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("steps", 1.5), ("damping", 0.0), ("damping", -1)])
def test_parameters_are_checked(name: str, value: float) -> None:
    with pytest.raises(inv.ConditionsError, match=rf"Phantom\({name}={value}\): accepted is a number"):
        Phantom(**{name: value})  # type: ignore[arg-type]
