"""``Unrolled`` and ``Truncated``: derivatives through the iterations of a solver.

Oracles: the implicit adjoint, whose own oracles are elsewhere, finite differences of the re-solved layer, and
for what stops early the derivative of the very iterate, written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import invlayer_core as inv
from invlayer_core.adjoints import Adjoint, Implicit, Truncated, Unrolled

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
RECORDED = pytest.mark.parametrize("adjoint", [Unrolled(), Truncated(3)], ids=repr)
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": grad,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "grad of grad": lambda f: grad(lambda b, A: grad(f)(b, A).pow(2).sum()),
    "jvp": lambda f: lambda b, A: jvp(f, (b, A), (b.cos(), A.sin()))[1],
}


def conditions(y: Tensor, b: Tensor, A: Tensor) -> Tensor:
    return y + y**3 @ A.T - b


def inputs(count: int = 4) -> tuple[Tensor, Tensor]:
    noise = 0.3 * torch.randn(3, 3)
    return torch.randn(count, 3), noise @ noise.T


def root_layer(adjoint: Adjoint, **keywords: Any) -> Callable[..., Tensor]:
    return lambda b, A: inv.root(conditions, torch.zeros_like(b), (b, A), adjoint=adjoint, **keywords)


def loss(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: layer(*args).pow(2).sum() + layer(*args).prod()


# --- every derivative -----------------------------------------------------------------------------------


@RECORDED
def test_finite_differences(adjoint: Adjoint) -> None:
    args = [t.requires_grad_() for t in inputs(2)]
    assert gradcheck(root_layer(adjoint), args, check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(root_layer(adjoint), args)


@RECORDED
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_agree_with_implicit(adjoint: Adjoint, name: str) -> None:
    args = inputs()
    ours = TRANSFORMS[name](loss(root_layer(adjoint)))(*args)
    theirs = TRANSFORMS[name](loss(root_layer(Implicit())))(*args)
    torch.testing.assert_close(ours, theirs, **TIGHT)


@RECORDED
def test_vmap(adjoint: Adjoint) -> None:
    b, A = inputs()
    layer = lambda b: root_layer(adjoint)(b, A)  # noqa: E731
    reference = lambda b: root_layer(Implicit())(b, A)  # noqa: E731
    torch.testing.assert_close(vmap(jacrev(layer))(b), vmap(jacrev(reference))(b), **TIGHT)
    torch.testing.assert_close(jacrev(vmap(layer))(b), jacrev(vmap(reference))(b), **TIGHT)


@RECORDED
def test_info_of_mapped_samples(adjoint: Adjoint) -> None:
    b, A = inputs()
    infos = []

    def layer(b: Tensor) -> Tensor:
        y, info = root_layer(adjoint, return_info=True)(b, A)
        infos.append(info)
        return y

    vmap(layer)(b)
    (info,) = infos
    plain = root_layer(adjoint, return_info=True)(b, A)[1]
    assert len(info.status) == len(info.message) == 4
    assert info.iterations.reshape(-1).tolist() == plain.iterations.tolist()


@RECORDED
def test_captured_parameters(adjoint: Adjoint) -> None:
    b, A = inputs()
    weight = torch.nn.Parameter(A)
    found = [
        torch.autograd.grad(
            inv.root(lambda y: y + y**3 @ weight.T - b, torch.zeros_like(b), adjoint=each).pow(2).sum(),
            weight,
        )[0]
        for each in (adjoint, Implicit())
    ]
    torch.testing.assert_close(found[0], found[1], **TIGHT)


@RECORDED
def test_pytrees_and_complex_unknowns(adjoint: Adjoint) -> None:
    a = torch.tensor([1.0 + 2.0j, -0.5j], requires_grad=True)
    y0 = {"z": torch.ones(2, dtype=torch.complex128), "x": torch.ones(1)}
    f = lambda y, a: {"z": y["z"] ** 2 - a, "x": y["x"] ** 3 - y["z"].abs().sum(-1, keepdim=True)}  # noqa: E731
    found = []
    for each in (adjoint, Implicit()):
        y = inv.root(f, y0, a, adjoint=each)
        found.append(torch.autograd.grad(y["z"].abs().sum() + y["x"].sum(), a)[0])
    torch.testing.assert_close(found[0], found[1], **TIGHT)


@RECORDED
def test_checkpoint_and_autocast(adjoint: Adjoint) -> None:
    b, A = (t.requires_grad_() for t in inputs())
    expected = torch.autograd.grad(root_layer(Implicit())(b, A).sum(), (b, A))
    y = checkpoint(root_layer(adjoint), b, A, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (b, A)), expected, **TIGHT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = root_layer(adjoint)(b, A)
    assert y.dtype == torch.float64
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (b, A)), expected, **TIGHT)


# --- what the value is, and what it costs ---------------------------------------------------------------


@pytest.mark.parametrize("solver", ["torch.newton", "torch.anderson", "torch.broyden"])
@RECORDED
def test_value_is_that_of_the_solver(adjoint: Adjoint, solver: str) -> None:
    """The recorded steps are for the derivative: y and its certificate stay what they are."""
    T = lambda y, b: 0.5 * torch.tanh(y.flip(-1)) + b  # noqa: E731
    b = torch.randn(4, 3, requires_grad=True)
    run = lambda each: inv.fixed_point(  # noqa: E731
        T, torch.zeros(4, 3), b, solver=solver, adjoint=each, return_info=True
    )
    (y, info), (expected, plain) = run(adjoint), run(Implicit())
    assert torch.equal(y, expected)
    assert torch.equal(info.residual, plain.residual)
    assert torch.equal(info.iterations, plain.iterations)
    assert info.linear_solver.startswith("none: derivatives go through")


def test_nothing_is_recorded_where_nothing_is_differentiated() -> None:
    b, A = inputs()
    for y in (root_layer(Unrolled())(b, A), root_layer(Truncated(2))(b, A)):
        assert y.grad_fn is None
    with torch.no_grad():
        assert root_layer(Unrolled())(b.requires_grad_(), A).grad_fn is None


def test_unrolled_is_the_derivative_of_the_iterate() -> None:
    """Two Newton steps on y² = a from 1: y₁ = (1 + a)/2, y₂ = (y₁ + a/y₁)/2."""
    a = torch.tensor([2.0], requires_grad=True)
    f = lambda y, a: y**2 - a  # noqa: E731
    y = inv.root(f, torch.ones(1), a, options={"maxiter": 2}, atol=1.0, adjoint=Unrolled())
    first = (1 + a) / 2
    expected = (first + a / first) / 2
    torch.testing.assert_close(y, expected, **TIGHT)
    ours, theirs = (torch.autograd.grad(each, a)[0] for each in (y, expected))
    torch.testing.assert_close(ours, theirs, **TIGHT)
    assert abs(float(ours) - 0.5 / 2**0.5) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_truncated_is_the_neumann_series_cut_off(steps: int) -> None:
    """Plain iteration on y = 0.6 y + a: after k steps the derivative is 1 + 0.6 + … + 0.6ᵏ⁻¹."""
    a = torch.tensor([1.0], requires_grad=True)
    T = lambda y, a: 0.6 * y + a  # noqa: E731
    y = inv.fixed_point(T, torch.zeros(1), a, solver="torch.anderson", adjoint=Truncated(steps))
    (found,) = torch.autograd.grad(y, a)
    assert abs(float(found) - (1 - 0.6**steps) / 0.4) < 1e-14


def test_truncated_newton_has_all_after_one_step() -> None:
    b, A = (t.requires_grad_() for t in inputs())
    found, expected = (
        torch.autograd.grad(root_layer(each)(b, A).sum(), (b, A)) for each in (Truncated(1), Implicit())
    )
    torch.testing.assert_close(found, expected, **TIGHT)


def _saved(layer: Callable[[], Tensor]) -> int:
    """The bytes that autograd keeps for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer()
    return sum(kept.values())


def test_memory_of_truncated_does_not_grow_with_iterations() -> None:
    a = torch.randn(64, 8, requires_grad=True)

    def layer(adjoint: Adjoint, rate: float) -> Tensor:
        T = lambda y, a: rate * torch.tanh(y) + a  # noqa: E731
        options = {"memory": 0}
        return inv.fixed_point(T, a.detach(), a, solver="torch.anderson", options=options, adjoint=adjoint)

    few, many = 0.3, 0.9  # 20 and 200 iterations
    truncated = [_saved(lambda rate=rate: layer(Truncated(3), rate)) for rate in (few, many)]
    unrolled = [_saved(lambda rate=rate: layer(Unrolled(), rate)) for rate in (few, many)]
    assert truncated[0] == truncated[1] < unrolled[0]
    assert unrolled[1] > 3 * unrolled[0]


# --- failed samples -------------------------------------------------------------------------------------


@RECORDED
@pytest.mark.parametrize("policy", ["nan", "zero_grad"])
def test_failed_samples_stay_by_themselves(adjoint: Adjoint, policy: Any) -> None:
    """As with Implicit: own rows get NaN or zero, and shared tensors NaN only if the failed one is asked."""
    f = lambda y, c, s: s * y**2 - c  # noqa: E731
    c = torch.tensor([[2.0], [-1.0], [3.0], [torch.nan]], requires_grad=True)
    s = torch.tensor(1.3, requires_grad=True)
    found = []
    for each in (adjoint, Implicit()):
        y = inv.root(f, torch.ones(4, 1), (c, s), adjoint=each, on_failure=policy)
        good = torch.autograd.grad(y[[0, 2]].sum(), (c, s), retain_graph=True)
        found.append((y.detach(), *good, *torch.autograd.grad(y.sum(), (c, s))))
    assert found[1][1].isfinite().all()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **TIGHT)


@RECORDED
def test_all_samples_failed(adjoint: Adjoint) -> None:
    a = torch.tensor([[1.0], [2.0]], requires_grad=True)
    y = inv.root(lambda y, a: y**2 + a, torch.ones(2, 1), a, adjoint=adjoint, on_failure="zero_grad")
    assert torch.equal(torch.autograd.grad(y.sum(), a)[0], torch.zeros(2, 1))
    y = inv.root(lambda y, a: y**2 + a, torch.ones(2, 1), a, adjoint=adjoint, on_failure="nan")
    assert bool(torch.autograd.grad(y.sum(), a)[0].isnan().all())


# --- what is refused ------------------------------------------------------------------------------------


@RECORDED
def test_function_of_your_own_is_refused(adjoint: Adjoint) -> None:
    b, A = inputs()
    with pytest.raises(
        inv.ConditionsError, match=r"came with solver '.*lambda.*': it differentiates through the solver's"
    ):
        root_layer(adjoint, solver=lambda y0, b, A: y0)(b, A)


@pytest.mark.plugin("invlayer-scipy")
@RECORDED
def test_opaque_solver_is_refused_and_others_are_named(adjoint: Adjoint) -> None:
    b, A = inputs()
    with pytest.raises(
        inv.ConditionsError,
        match=r"came with solver 'scipy.root'.*torch.anderson, torch.broyden, .*torch.newton\. For any other",
    ):
        root_layer(adjoint, solver="scipy.root")(b, A)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_number_of_steps_is_checked(steps: Any) -> None:
    with pytest.raises(inv.ConditionsError, match=r"Truncated\(steps=.*accepted is a number of iterations"):
        Truncated(steps)


def test_solvers_without_iterations_at_a_solution_say_so() -> None:
    a = torch.ones(2, 1, requires_grad=True)
    with pytest.raises(
        inv.ConditionsError, match=r"torch.anderson: iterations from a solution of kind 'root'"
    ):
        inv.root(lambda y, a: y**3 - a, torch.ones(2, 1), a, solver="torch.anderson", adjoint=Truncated(3))
    with pytest.raises(inv.ConditionsError, match=r"torch.lbfgs: its iterations from a solution say nothing"):
        inv.minimize(lambda y, a: (y - a).square().sum(-1), a.detach(), a, adjoint=Truncated(3))


class Halving(inv.DifferentiableSolver):
    """A plugin author's: y ← y − F/2."""

    def solve(self, problem: Any, y0: Tensor, options: Any) -> inv.SolverResult:
        return inv.SolverResult(self.iterate(problem, y0, options, 60), iterations=60)

    def iterate(self, problem: Any, y0: Tensor, options: Any, steps: int) -> Tensor:
        for _ in range(steps):
            y0 = y0 - 0.5 * problem.residual(y0)
        return y0


@pytest.mark.parametrize("adjoint", [Unrolled(), Truncated(50)], ids=repr)
def test_solver_of_your_own(adjoint: Adjoint) -> None:
    a = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = inv.root(lambda y, a: y + 0.2 * y**3 / a - a, torch.ones(1, 2), a, solver=Halving(), adjoint=adjoint)
    expected = inv.root(lambda y, a: y + 0.2 * y**3 / a - a, torch.ones(1, 2), a)
    for ours, theirs in (
        (y, expected),
        *zip(*(torch.autograd.grad(e.sum(), a) for e in (y, expected)), strict=True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@RECORDED
def test_traced_layers_are_refused(adjoint: Adjoint) -> None:
    """The operator of a traced graph does not hand on the solver."""
    b, A = inputs()
    layer = inv.RootLayer(conditions, adjoint=adjoint)
    whole = torch.compile(lambda b, y0: layer(b, A, y0=y0), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="no other adjoint than Implicit"):
        whole(b, torch.zeros_like(b))
    torch.compiler.reset()
