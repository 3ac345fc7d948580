"""Where J is singular: an error, or what was asked for. Where it only looks so: the right gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.adjoints import Implicit

pytestmark = pytest.mark.usefixtures("float64")

SINGULAR, REGULAR = 1, [0, 2, 3]
DAMPING = 1e-3


# --- one singular sample of four ------------------------------------------------------------------------


def conditions(y: Tensor, p: Tensor, a: Tensor) -> Tensor:
    """y₁² = a₁ has a double root at a₁ = 0; p is shared."""
    first, second = y.unbind(-1)
    return torch.stack([first * first - p * a[..., 0], second + 0.5 * first * second - a[..., 1]], -1)


def exact(_y0: Tensor, p: Tensor, a: Tensor) -> Tensor:
    first = (p * a[..., 0]).sqrt()
    return torch.stack([first, a[..., 1] / (1 + 0.5 * first)], -1)


def inputs() -> tuple[Tensor, Tensor]:
    p = torch.tensor(1.5, requires_grad=True)
    a = torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.25, -1.0], [4.0, 0.5]], requires_grad=True)
    return p, a


def solve(p: Tensor, a: Tensor, **policy: Any) -> Tensor:
    return inv.root(conditions, torch.ones_like(a), args=(p, a), solver=exact, adjoint=Implicit(**policy))


def jacobian_at_singular_sample() -> Tensor:
    """∂F/∂y at y = (0, 3)."""
    return torch.tensor([[0.0, 0.0], [1.5, 1.0]])


def test_singular_sample_raises_by_default() -> None:
    p, a = inputs()
    with pytest.raises(
        inv.SingularJacobianError, match=r"sample 1 \(residual \S+, condition \S+, .*\), of 4 samples"
    ):
        solve(p, a).sum().backward()


def test_message_gives_the_residual() -> None:
    p, a = inputs()
    with pytest.raises(inv.SingularJacobianError, match="residual"):
        solve(p, a).sum().backward()


def expected_weights(policy: str, cotangent: Tensor) -> Tensor:
    """What the policy makes of w = J⁻ᵀ ȳ at the singular sample."""
    blocks = jacobian_at_singular_sample()
    if policy == "lstsq":
        return torch.linalg.pinv(blocks.mT) @ cotangent
    if policy == "damped":
        return torch.linalg.solve(blocks @ blocks.mT + DAMPING**2 * torch.eye(2), blocks @ cotangent)
    return torch.full((2,), math.nan if policy == "nan" else 0.0)


POLICIES = pytest.mark.parametrize("policy", ["lstsq", "damped", "nan", "zero"])


@POLICIES
def test_policy_answers_for_the_singular_sample(policy: str) -> None:
    p, a = inputs()
    cotangent = torch.tensor([0.7, -0.3]).expand(4, 2)
    (of_a,) = torch.autograd.grad(solve(p, a, singular=policy, damping=DAMPING), a, cotangent)
    weights = expected_weights(policy, cotangent[0])
    expected = weights * torch.tensor([1.5, 1.0])  # ∂F/∂a = −diag(p, 1)
    torch.testing.assert_close(of_a[SINGULAR], expected, equal_nan=True, rtol=1e-9, atol=1e-12)


@POLICIES
def test_policy_in_forward_mode(policy: str) -> None:
    p, a = (tensor.detach() for tensor in inputs())
    tangent = torch.tensor([0.7, -0.3]).expand(4, 2)
    _, moved = torch.func.jvp(lambda a: solve(p, a, singular=policy, damping=DAMPING), (a,), (tangent,))
    blocks, right = jacobian_at_singular_sample(), torch.tensor([1.5 * 0.7, -0.3])
    expected = {
        "lstsq": torch.linalg.pinv(blocks) @ right,
        "damped": torch.linalg.solve(blocks.mT @ blocks + DAMPING**2 * torch.eye(2), blocks.mT @ right),
        "nan": torch.full((2,), math.nan),
        "zero": torch.zeros(2),
    }[policy]
    torch.testing.assert_close(moved[SINGULAR], expected, equal_nan=True, rtol=1e-9, atol=1e-12)
    _, alone = torch.func.jvp(lambda a: solve(p, a), (a[REGULAR],), (tangent[REGULAR],))
    assert torch.equal(moved[REGULAR], alone)


@POLICIES
def test_regular_samples_keep_every_bit(policy: str) -> None:
    """First and second derivatives of the three regular samples, in a batch with the singular one."""

    def both(a: Tensor, rows: list[int], **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        p, a = torch.tensor(1.5, requires_grad=True), a.clone().requires_grad_()
        y = solve(p, a, **keywords)
        (first,) = torch.autograd.grad(y.pow(3).sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first[rows].pow(2).sum(), a)
        return y.detach()[rows], first.detach()[rows], second[rows]

    a = inputs()[1].detach()
    together = both(a, REGULAR, singular=policy)
    alone = both(a[REGULAR], [0, 1, 2])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))


@POLICIES
def test_shared_parameter(policy: str) -> None:
    """It is the sum over samples, so only "nan" makes it NaN; ∂F/∂p is zero at the singular sample."""
    p, a = inputs()
    (of_p,) = torch.autograd.grad(solve(p, a, singular=policy).sum(), p)
    (expected,) = torch.autograd.grad(solve(p, a.detach()[REGULAR]).sum(), p)
    if policy == "nan":
        assert bool(of_p.isnan())
    else:
        torch.testing.assert_close(of_p, expected)


@pytest.mark.parametrize("policy", ["raise", "consistent", "lstsq", "damped", "nan", "zero"])
def test_zero_cotangent_asks_for_nothing(policy: str) -> None:
    p, a = inputs()
    of_p, of_a = torch.autograd.grad(solve(p, a, singular=policy)[REGULAR].sum(), (p, a))
    alone = a.detach()[REGULAR].requires_grad_()
    expected = torch.autograd.grad(solve(p, alone).sum(), (p, alone))
    assert torch.equal(of_a[SINGULAR], torch.zeros(2))
    assert torch.equal(of_a[REGULAR], expected[1])
    torch.testing.assert_close(of_p, expected[0])


def test_nan_cotangent_is_named_as_the_origin() -> None:
    p, a = inputs()
    cotangent = torch.ones(4, 2)
    cotangent[SINGULAR, 0] = math.nan
    with pytest.raises(inv.SingularJacobianError, match="cotangent that came in already holds NaN"):
        solve(p, a).backward(cotangent)


def test_nan_cotangent_of_a_regular_sample_stays_there() -> None:
    p, a = inputs()
    a = a.detach()[REGULAR].requires_grad_()
    cotangent = torch.ones(3, 2)
    cotangent[1, 0] = math.nan
    (of_a,) = torch.autograd.grad(solve(p, a), a, cotangent)
    (clean,) = torch.autograd.grad(solve(p, a), a, torch.ones(3, 2))
    assert bool(of_a[1].isnan().any())
    assert torch.equal(of_a[[0, 2]], clean[[0, 2]])


def test_nan_in_the_jacobian_is_named_as_the_origin() -> None:
    a = torch.tensor([[0.0], [1.0]], requires_grad=True)
    y = inv.root(lambda y, a: y.abs().sqrt() - a, torch.ones(2, 1), args=a, solver=lambda y0, a: a**2)
    with pytest.raises(inv.SingularJacobianError, match=r"sample 0(?s:.*)The Jacobian holds NaN"):
        y.sum().backward()


def test_unknown_policy() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"'ignore'.: accepted are 'raise', 'consistent', 'lstsq', 'damped'"
    ):
        Implicit(singular="ignore")


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f, a: vmap(grad(lambda a: f(a).sum()))(a), id="vmap(grad)"),
        pytest.param(lambda f, a: grad(lambda a: vmap(f)(a).sum())(a), id="grad(vmap)"),
        pytest.param(lambda f, a: jacrev(f)(a), id="jacrev"),
        pytest.param(lambda f, a: jacfwd(f)(a), id="jacfwd"),
        pytest.param(lambda f, a: jacfwd(jacfwd(f))(a), id="jacfwd(jacfwd)"),
    ],
)
def test_singular_sample_raises_under_transforms(transform: Any) -> None:
    p, a = (tensor.detach() for tensor in inputs())
    with pytest.raises(inv.SingularJacobianError, match="sample 1 "):
        transform(lambda a: solve(p, a), a)


@pytest.mark.parametrize("policy", ["lstsq", "damped", "zero"])
def test_policy_under_vmap(policy: str) -> None:
    p, a = inputs()
    per_sample = vmap(grad(lambda a: solve(p.detach(), a, singular=policy).sum()))(a.detach())
    (together,) = torch.autograd.grad(solve(p, a, singular=policy).sum(), a)
    torch.testing.assert_close(per_sample, together, rtol=1e-12, atol=1e-12)


# --- singular, but not exactly: solvers stop beside the root --------------------------------------------


def double_root(y: Tensor, a: Tensor) -> Tensor:
    return y**2 - a


def triple_root(y: Tensor, a: Tensor) -> Tensor:
    return y**3 - a


def tangency(y: Tensor, a: Tensor) -> Tensor:
    """A circle and its tangent."""
    first, second = y.unbind(-1)
    return torch.stack([first**2 + second**2 - 1, second - 1 - a[..., 0] + 0 * first], -1)


def fold(y: Tensor, a: Tensor) -> Tensor:
    """1 − y² + a = 0 turned: the branch ends at a = −1."""
    return (y - 1) * (y - 1) * (y + 2) - a


def redundant(y: Tensor, a: Tensor) -> Tensor:
    """The third equation is the sum of the other two."""
    first, second, third = y.unbind(-1)
    one, two = first + second**2 - 2 - a[..., 0], second + third**3 - 2 + 0 * a[..., 0]
    return torch.stack([one, two, one + two], -1)


NEARLY = {
    "double root": (double_root, [1.0]),
    "double root, from far": (double_root, [1e6]),
    "triple root": (triple_root, [1.0]),
    "tangency": (tangency, [0.3, 0.7]),
    "fold": (fold, [1.4]),
    "redundant": (redundant, [0.8, 1.1, 0.9]),
}
SOLVERS = pytest.mark.parametrize(
    "solver", ["torch.newton", pytest.param("scipy.root", marks=pytest.mark.plugin("invlayer-scipy"))]
)


@SOLVERS
@pytest.mark.parametrize(("function", "start"), NEARLY.values(), ids=NEARLY)
def test_solver_stopped_beside_a_singular_root(function: Any, start: list[float], solver: str) -> None:
    a = torch.zeros(1, requires_grad=True)
    y = inv.root(function, torch.tensor(start), args=a, solver=solver)
    with pytest.raises(inv.SingularJacobianError, match="sample 0 "):
        y.sum().backward()


@pytest.mark.parametrize("distance", [1e-8, 1e-7, 1e-6, 3e-6])
def test_loose_solver_stopped_beside_a_double_root(distance: float) -> None:
    a = torch.zeros(1, requires_grad=True)
    y = inv.root(double_root, torch.ones(1), args=a, solver=lambda y0, a: y0 * distance)
    with pytest.raises(inv.SingularJacobianError, match="sample 0 "):
        y.sum().backward()


@pytest.mark.xfail(
    strict=True, reason="J is only examined where the answer grows 1e5-fold: 1/(2·5e-4) passes"
)
def test_loosest_accepted_solution_beside_a_double_root() -> None:
    """y = 5e-4 satisfies y² = 0 to 2.5e-7, so it is accepted; its gradient of 1000 means nothing."""
    a = torch.zeros(1, requires_grad=True)
    y = inv.root(double_root, torch.ones(1), args=a, solver=lambda y0, a: y0 * 5e-4)
    with pytest.raises(inv.SingularJacobianError, match="sample 0 "):
        y.sum().backward()


# --- bad numbers, good problems: these must not raise ---------------------------------------------------


def base(y: Tensor, a: Tensor) -> Tensor:
    """A well-conditioned system of three."""
    return y + 0.3 * torch.sin(y.roll(1, -1)) + 0.2 * y**3 - a


ROWS = {
    "rows 1e10": ([1.0, 1e10, 1.0], [1.0, 1.0, 1.0]),
    "rows 1e-10": ([1e-10, 1.0, 1.0], [1.0, 1.0, 1.0]),
    "all rows tiny": ([1e-12, 1e-12, 1e-12], [1.0, 1.0, 1.0]),
    "columns 1e10": ([1.0, 1.0, 1.0], [1.0, 1e10, 1.0]),
    "units 1e-9 and 1e9": ([1.0, 1.0, 1.0], [1e-9, 1e9, 1.0]),
    "rows and units": ([1e9, 1e-9, 1.0], [1e-9, 1e9, 1.0]),
}


@pytest.mark.parametrize(("row", "unit"), ROWS.values(), ids=ROWS)
def test_bad_scaling_is_not_singularity(row: list[float], unit: list[float]) -> None:
    """Equations times ``row``, unknowns measured in ``unit``: the gradient scales by ``unit``, no more."""
    rows, units = torch.tensor(row), torch.tensor(unit)
    a = torch.tensor([[0.5, -0.7, 1.1], [1.2, 0.3, -0.4]], requires_grad=True)

    def gradient(scaled: bool) -> Tensor:
        r, u = (rows, units) if scaled else (torch.ones(3), torch.ones(3))
        y = inv.root(lambda y, a: r * base(y / u, a), torch.zeros(2, 3), args=a)
        return torch.autograd.grad((y / u * torch.tensor([1.0, 2.0, -1.0])).sum(), a)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-9, atol=1e-12)


def hilbert(n: int) -> Tensor:
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index + 1)


@pytest.mark.parametrize("n", [4, 6, 8])
def test_ill_conditioned_linear_system(n: int) -> None:
    """Hilbert matrices: condition 1.6e4, 1.5e7 and 1.5e10, but an inverse with integer entries."""
    matrix = hilbert(n)
    a = torch.ones(n, requires_grad=True)
    solution = torch.linalg.solve(matrix, a.detach())
    y = inv.root(lambda y, a: matrix @ y - a, torch.zeros(n), args=a, solver=lambda y0, a: solution)
    (of_a,) = torch.autograd.grad(y[0], a)
    binomials = [
        (-1) ** k * (k + 1) * math.comb(n + k, n - 1) * math.comb(n, n - k - 1) / 1.0 for k in range(n)
    ]  # first row of the inverse Hilbert matrix
    error = (of_a - torch.tensor(binomials)).norm() / torch.tensor(binomials).norm()
    assert float(error) < 4 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(matrix))


@pytest.mark.parametrize("a", [1e-2, 1e-6, 1e-10, 1e-12])
def test_close_to_a_double_root_but_regular(a: float) -> None:
    """y² = a, solved exactly: dy/da = 1/(2√a), large and right."""
    arg = torch.tensor([a], requires_grad=True)
    y = inv.root(double_root, torch.ones(1), args=arg, solver=lambda y0, a: a.sqrt())
    (gradient,) = torch.autograd.grad(y.sum(), arg)
    torch.testing.assert_close(gradient, torch.tensor([0.5 * a**-0.5]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("a", [1e-12, 1e-9, 1e9, 1e12])
def test_exponential_with_a_tiny_or_huge_slope(a: float) -> None:
    arg = torch.tensor([a], requires_grad=True)
    y = inv.root(lambda y, a: y.exp() - a, arg.detach().log() + 0.1, args=arg, atol=1e-6 * a)
    (gradient,) = torch.autograd.grad(y.sum(), arg)
    torch.testing.assert_close(gradient, torch.tensor([1 / a]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_whole_problem_in_tiny_or_huge_units(size: float) -> None:
    """y, a and F all in units of ``size``: every derivative of y with respect to a stays what it is."""
    a = torch.tensor([0.5, -0.7, 1.1], requires_grad=True)
    y = inv.root(lambda y, a: size * base(y / size, a), torch.zeros(3), args=a, atol=1e-6 * size, rtol=1e-9)
    (gradient,) = torch.autograd.grad(y[0] / size, a)
    (expected,) = torch.autograd.grad(inv.root(base, torch.zeros(3), args=a)[0], a)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_growth_in_elimination_does_not_spoil_the_gradient() -> None:
    """Wilkinson's matrix: condition 45 at n = 100, but LU with partial pivoting grows by 2^99."""
    n = 100
    matrix = torch.eye(n) - torch.tril(torch.ones(n, n), -1)
    matrix[:, -1] = 1
    a, cotangent = torch.randn(n, requires_grad=True), torch.randn(n)
    solution = torch.linalg.pinv(matrix) @ a.detach()
    y = inv.root(lambda y, a: matrix @ y - a, torch.zeros(n), args=a, solver=lambda y0, a: solution)
    (gradient,) = torch.autograd.grad(y, a, cotangent)
    expected = torch.linalg.pinv(matrix).mT @ cotangent
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


# --- redundant equations: singular, and yet y is a differentiable function of the args -------------------


def redundant(y: Tensor, a: Tensor) -> Tensor:
    """y₁ is determined; the multiplier-like y₂, y₃ only by their sum: rank 2 of 3."""
    first, second, third = y.unbind(-1)
    return torch.stack([first + second + third - a[..., 0], first - a[..., 1], 2 * (first - a[..., 1])], -1)


def of_least_norm(_y0: Tensor, a: Tensor) -> Tensor:
    rest = (a[..., 0] - a[..., 1]) / 2
    return torch.stack([a[..., 1], rest, rest], -1)


def solve_redundant(a: Tensor) -> Tensor:
    return inv.root(
        redundant, torch.zeros(3), args=a, solver=of_least_norm, adjoint=Implicit(singular="consistent")
    )


def test_consistent_gives_what_is_determined() -> None:
    a = torch.tensor([3.0, 1.0], requires_grad=True)
    jacobian = torch.stack([torch.autograd.grad(solve_redundant(a)[i], a)[0] for i in (0,)])
    torch.testing.assert_close(jacobian, torch.tensor([[0.0, 1.0]]), rtol=0, atol=1e-12)
    (total,) = torch.autograd.grad(solve_redundant(a)[1:].sum(), a)
    torch.testing.assert_close(total, torch.tensor([1.0, -1.0]), rtol=0, atol=1e-12)


def test_consistent_refuses_what_is_not() -> None:
    a = torch.tensor([3.0, 1.0], requires_grad=True)
    with pytest.raises(inv.SingularJacobianError, match="redundant equations"):
        solve_redundant(a)[1].backward()


def test_consistent_refuses_a_double_root() -> None:
    p, a = inputs()
    with pytest.raises(inv.SingularJacobianError, match="sample 1"):
        solve(p, a, singular="consistent").sum().backward()


def test_consistent_needs_blocks() -> None:
    with pytest.raises(inv.ConditionsError, match="needs the dense Jacobian"):
        Implicit(singular="consistent", linear_solver=inv.linear.GMRES())


def test_args_that_f_does_not_read_leave_the_diagnosis_as_it_is() -> None:
    """∂F/∂b has no graph of its own to be differentiated."""
    a, b = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    y = inv.root(lambda y, a, b: y * y - a, torch.ones(1), (a, b), solver=lambda y0, a, b: a.sqrt())
    with pytest.raises(inv.SingularJacobianError, match="sample 0"):
        torch.autograd.grad(y.sum(), (a, b))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_consistent_is_free_of_the_units_of_equations_and_unknowns(scale: float) -> None:
    """A KKT matrix with a redundant row, whose objective is in other units than its constraints."""

    def conditions(z: Tensor, p: Tensor) -> Tensor:
        y, multipliers = z[..., :2], z[..., 2:]
        total = y.sum(-1, keepdim=True) - 1
        slope = scale * torch.tensor([1.0, 3.0]) * (y - p) - multipliers.sum(-1, keepdim=True)
        return torch.cat([slope, total, total], -1)

    def exact(p: Tensor) -> Tensor:
        excess = p.sum(-1, keepdim=True) - 1
        return p - excess * torch.tensor([0.75, 0.25])

    def solver(_z0: Tensor, p: Tensor) -> Tensor:
        y = exact(p)
        multiplier = scale * (y - p)[..., :1] / 2
        return torch.cat([y, multiplier, multiplier], -1)

    p = torch.tensor([0.3, 0.9], requires_grad=True)
    adjoint = Implicit(singular="consistent")
    solve = lambda p: inv.root(conditions, torch.zeros(4), p, solver=solver, adjoint=adjoint)[:2]  # noqa: E731
    expected = jacrev(exact)(p.detach())
    found = torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in solve(p)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(jacrev(solve)(p.detach()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", ["raise", "consistent"])
def test_mapped_cotangents_name_the_sample(policy: str) -> None:
    p, a = inputs()
    with pytest.raises(inv.SingularJacobianError, match=r"sample 1 \(.*of 4 samples"):
        jacrev(lambda a: solve(p.detach(), a, singular=policy))(a.detach())
