"""Constrained minimisation: bounds, degenerate cases, smoothing, transforms, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.conditions.kkt import ConstraintLayout, KKTConditions, Program

pytestmark = pytest.mark.usefixtures("float64")

CURVATURE = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def objective(y: Tensor, p: Tensor) -> Tensor:
    """½ Σ c (y − p)²: projected onto a box, every y is p clipped to it."""
    return 0.5 * (CURVATURE * (y - p).square()).sum(-1)


@inv.from_numpy
def clipped(y0: np.ndarray, p: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.clip(p, lower, upper), y0.shape).copy()


def box(p: Tensor, lower: Tensor, upper: Tensor, **keywords: Any) -> Any:
    return inv.nlp(
        lambda y, p, *_: objective(y, p),
        torch.zeros_like(p),
        (p, lower, upper),
        bounds=(lower, upper),
        solver=clipped,
        **keywords,
    )


P = torch.tensor([[-1.0, 0.3, 2.0], [0.5, 3.0, 0.2]], dtype=torch.float64)


def test_bounds_carry_gradients() -> None:
    p, lower, upper = (t.clone().requires_grad_() for t in (P, torch.zeros(3), torch.ones(3)))
    y, multipliers = box(p, lower, upper, return_multipliers=True)
    found = torch.autograd.grad(y.sum() + 10 * y[0].sum(), (p, lower, upper))
    expected = torch.autograd.grad(
        (clip := torch.maximum(torch.minimum(p, upper), lower)).sum() + 10 * clip[0].sum(), (p, lower, upper)
    )
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    torch.testing.assert_close(multipliers.lower, CURVATURE * (0 - P).clamp_min(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(multipliers.upper, CURVATURE * (P - 1).clamp_min(0), rtol=0, atol=1e-12)


def test_gradcheck_of_everything() -> None:
    inputs = [t.clone().requires_grad_() for t in (P, torch.zeros(3), torch.ones(3))]
    outputs = lambda *a: (lambda y, m: (y, m.lower, m.upper))(*box(*a, return_multipliers=True))  # noqa: E731
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("bounds", [(0.0, None), (None, 1.0), (None, None), None, (-torch.inf, torch.inf)])
def test_any_subset_of_bounds(bounds: Any) -> None:
    lower, upper = (None, None) if bounds is None else bounds
    solver = inv.from_numpy(lambda y0, p: np.clip(p, lower, upper))
    p = P.clone().requires_grad_()
    y = inv.nlp(objective, torch.zeros_like(p), p, bounds=bounds, solver=solver)
    (found,) = torch.autograd.grad(y.sum(), p)
    free = torch.ones_like(P, dtype=torch.bool)
    free &= (-torch.inf if lower is None else lower) < P
    free &= (torch.inf if upper is None else upper) > P
    torch.testing.assert_close(found, free.double(), rtol=0, atol=1e-12)


def test_equal_bounds_fix_an_unknown() -> None:
    lower = torch.tensor([0.0, 0.5, 0.0], requires_grad=True)
    upper = torch.tensor([1.0, 0.5, 1.0])
    p = P.clone().requires_grad_()
    y, multipliers = box(p, lower, upper, return_multipliers=True)
    assert torch.equal(y.detach()[:, 1], torch.full((2,), 0.5))
    of_p, of_lower = torch.autograd.grad(y[:, 1].sum(), (p, lower), retain_graph=True)
    assert torch.equal(of_p, torch.zeros_like(P))
    torch.testing.assert_close(of_lower, torch.tensor([0.0, 2.0, 0.0]), rtol=0, atol=1e-12)
    slope = CURVATURE[1] * (0.5 - P[:, 1])
    torch.testing.assert_close((multipliers.lower - multipliers.upper)[:, 1], slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_transforms(transform: Any) -> None:
    lower, upper = torch.zeros(3), torch.ones(3)
    solve = lambda p: box(p, lower, upper)  # noqa: E731
    expected = torch.diag_embed(((P > 0) & (P < 1)).double())
    torch.testing.assert_close(vmap(transform(solve))(P), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform(solve)(P[0]), expected[0], rtol=0, atol=1e-12)


def test_second_derivative_in_an_active_set() -> None:
    """min −log y₁ − p log y₂ on y₁ + 2 y₂ = 1: y = (1, p/2) / (1 + p)."""

    def solve(p: Tensor) -> Tensor:
        return inv.nlp(
            lambda y, p: -y[..., 0].log() - p[..., 0] * y[..., 1].log(),
            torch.full((2,), 0.3),
            p,
            eq=lambda y, p: y[..., :1] + 2 * y[..., 1:] - 1,
            bounds=(1e-3, None),
            solver=lambda y0, p: exact(p),
        )

    def exact(p: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(p), p / 2], -1) / (1 + p)

    p = torch.tensor([0.7])
    torch.testing.assert_close(jacrev(solve)(p), jacrev(exact)(p), rtol=1e-10, atol=1e-11)
    for order in (hessian, lambda f: jacrev(jacrev(f))):
        found, expected = (order(lambda p, g=g: g(p)[1])(p) for g in (solve, exact))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


class Limit(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor([0.4], dtype=torch.float64))

    def forward(self, y: Tensor, p: Tensor) -> Tensor:
        return self.level - y[..., :1]


def test_parameters_of_a_constraint() -> None:
    limit, p = Limit(), torch.tensor([0.9, 0.1, 0.2])

    def solver(y0: Tensor, p: Tensor) -> Tensor:
        return torch.cat([p[..., :1].clamp_max(0.4), p[..., 1:]], -1)

    layer = inv.NLPLayer(objective, ineq=limit, solver=solver)
    layer(p, y0=torch.zeros(3))[0].backward()
    torch.testing.assert_close(limit.level.grad, torch.ones(1), rtol=0, atol=1e-12)
    swapped = {"ineq.level": torch.tensor([0.4], requires_grad=True)}
    y = functional_call(layer, swapped, (p,), {"y0": torch.zeros(3)})
    (found,) = torch.autograd.grad(y[0], swapped["ineq.level"])
    torch.testing.assert_close(found, torch.ones(1), rtol=0, atol=1e-12)


# --- degenerate cases -----------------------------------------------------------------------------------


def test_weakly_active_bound_is_named() -> None:
    p = torch.tensor([0.0, 0.5, 0.5], requires_grad=True)  # the bound 0 holds, and nothing pushes against it
    with pytest.warns(inv.DegeneracyWarning, match=r"weakly active constraint \(sample 0: lower\[0\]\)"):
        _, info = box(p, torch.zeros(3), torch.ones(3), return_info=True)
    assert info.constraints.weakly_active.nonzero().tolist() == [[0]]


def test_no_warning_without_gradients() -> None:
    _, info = box(torch.tensor([0.0, 0.5, 0.5]), torch.zeros(3), torch.ones(3), return_info=True)
    assert info.constraints.weakly_active.any()


def test_dependent_equations_are_named_and_harmless() -> None:
    """The same equation twice: y has its derivative, the multipliers share theirs."""

    def twice(y: Tensor, p: Tensor) -> Tensor:
        total = y.sum(-1, keepdim=True) - 1
        return torch.cat([total, 3 * total], -1)

    def solver(y0: Tensor, p: Tensor) -> Tensor:
        return p - (p.sum(-1, keepdim=True) - 1) / (1 / CURVATURE).sum() / CURVATURE

    p = P.clone().requires_grad_()
    y, info = inv.nlp(objective, torch.zeros_like(p), p, eq=twice, solver=solver, return_info=True)
    assert not bool(info.constraints.independent.any())
    (found,) = torch.autograd.grad(y[:, 0].sum(), p)
    (expected,) = torch.autograd.grad(solver(y, p)[:, 0].sum(), p)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_equality_with_a_vanishing_multiplier_is_active() -> None:
    """The unconstrained minimum satisfies the equation: λ = 0, and still y may not leave it."""
    p = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    solver = lambda y0, p: p - (p.sum() - 1) / (1 / CURVATURE).sum() / CURVATURE  # noqa: E731
    y = inv.nlp(objective, torch.zeros(3), p, eq=lambda y, p: y.sum(-1, keepdim=True) - 1, solver=solver)
    jacobian = torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in y])
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("barrier", [1e-2, 1e-4])
def test_soft_activity_is_the_derivative_of_the_barrier_problem(barrier: float) -> None:
    """min ½(y − p)² − μ log y: y = (p + √(p² + 4μ)) / 2, where an interior-point method stops at μ."""
    p = torch.linspace(-0.5, 0.5, 5).unsqueeze(-1).requires_grad_()

    def centre(p: Tensor) -> Tensor:
        return (p + (p.square() + 4 * barrier).sqrt()) / 2

    conditions = KKTConditions(
        Program(lambda y, p: 0.5 * (y - p).square().sum(-1), None, None, True, False),
        ConstraintLayout(1, 0, 0, 1, 0),
        "soft",
    )

    @inv.implicit_function(conditions=conditions, atol=1.0)
    def solve(p: Tensor, lower: Tensor, upper: None) -> Tensor:
        y = centre(p)
        return torch.cat([y, barrier / y], -1)

    (found,) = torch.autograd.grad(solve(p, torch.zeros(1), None)[:, 0].sum(), p)
    (expected,) = torch.autograd.grad(centre(p).sum(), p)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


# --- what comes in --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"bounds": 3.0}, r"bounds=3.0\): accepted is a pair"),
        ({"bounds": (torch.zeros(5), None)}, r"the lower bound has shape \(5,\)"),
        ({"bounds": (None, torch.zeros(3, dtype=torch.int64))}, "the upper bound has .*int64"),
        ({"activity": "hard"}, "activity='hard'.: accepted are"),
        ({"eq": lambda y, p: y.sum()}, r"accepted .*\(2,"),
        ({"ineq": lambda y, p: 3.0}, "float"),
        ({"solver": "torch.newton"}, "that solver is for"),
        ({"solver": "no.such"}, "no.such"),
    ],
)
def test_wrong_input(wrong: dict[str, Any], match: str) -> None:
    keywords = {"solver": lambda y0, p: p, **wrong}
    with pytest.raises(inv.InvlayerError, match=match):
        inv.nlp(objective, torch.zeros_like(P), P, **keywords)


def test_one_constraint_needs_no_dim_of_its_own() -> None:
    solver = lambda y0, p: p - (p.sum(-1, keepdim=True) - 1) / (1 / CURVATURE).sum() / CURVATURE  # noqa: E731
    keywords: dict[str, Any] = {"solver": solver, "return_multipliers": True}
    flat = inv.nlp(objective, torch.zeros_like(P), P, eq=lambda y, p: y.sum(-1) - 1, **keywords)
    kept = inv.nlp(objective, torch.zeros_like(P), P, eq=lambda y, p: y.sum(-1, True) - 1, **keywords)
    assert torch.equal(flat[0], kept[0])
    assert torch.equal(flat[1].equalities, kept[1].equalities)


def test_infeasible_answer_is_caught() -> None:
    with pytest.raises(inv.ConvergenceError, match="measured residual"):
        inv.nlp(
            objective,
            torch.zeros_like(P),
            P,
            eq=lambda y, p: y.square().sum(-1, keepdim=True) + 1,
            solver=lambda y0, p: p,
        )


def test_a_failed_sample_stays_alone() -> None:
    p = P.clone().requires_grad_()

    @inv.from_numpy
    def partly(y0: np.ndarray, p: np.ndarray) -> np.ndarray:
        y = np.clip(p, 0.0, 1.0)
        y[0] = np.nan
        return y

    y, info = inv.nlp(
        objective,
        torch.zeros_like(p),
        p,
        bounds=(0.0, 1.0),
        solver=partly,
        on_failure="nan",
        return_info=True,
    )
    assert info.ok.tolist() == [False, True]
    (found,) = torch.autograd.grad(y[1].sum(), p)
    alone = P[1:].clone().requires_grad_()
    single = inv.nlp(
        objective,
        torch.zeros(1, 3),
        alone,
        bounds=(0.0, 1.0),
        solver=inv.from_numpy(lambda y0, p: np.clip(p, 0, 1)),
    )
    (expected,) = torch.autograd.grad(single.sum(), alone)
    assert torch.equal(found[1:], expected)
    assert torch.equal(y[1:].detach(), single.detach())


def test_a_failed_sample_leaves_absent_bounds_absent() -> None:
    """Infinity is a bound that is not there, in whatever way NaN is kept from the good samples."""
    p = torch.tensor([[0.3, 0.1, 2.0], [2.0, 0.4, 0.1], [-0.5, -3.0, 0.2]])
    p[1, 0] = torch.nan
    p.requires_grad_()
    lower = torch.tensor([-torch.inf, -1.0, 0.0]).repeat(3, 1)
    y = box(p, lower, torch.full((3, 3), torch.inf), on_failure="nan")
    (slope,) = torch.autograd.grad(y[::2].sum(), p)
    torch.testing.assert_close(
        slope[::2], torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]), rtol=1e-12, atol=0
    )


def test_named_unknowns_and_bounds() -> None:
    p = P.clone().requires_grad_()
    y0 = {"first": torch.zeros(2, 1), "rest": torch.zeros(2, 2)}
    lower = {"first": torch.zeros(2, 1), "rest": torch.zeros(2, 2)}
    y, multipliers = inv.nlp(
        lambda y, p: objective(torch.cat([y["first"], y["rest"]], -1), p),
        y0,
        p,
        bounds=(lower, 1.0),
        solver=lambda y0, p: {"first": p[:, :1].clamp(0, 1), "rest": p[:, 1:].clamp(0, 1)},
        return_multipliers=True,
    )
    torch.testing.assert_close(y["rest"].detach(), P[:, 1:].clamp(0, 1))
    assert multipliers.lower["first"].shape == (2, 1)
    torch.testing.assert_close(multipliers.lower["first"].detach(), (-P[:, :1]).clamp_min(0))


def test_warm_start_and_guesses_from_args() -> None:
    starts = []

    def clip(y0: Tensor, p: Tensor) -> Tensor:
        starts.append(y0.clone())
        return p.clamp(0.0, 1.0)

    keywords: dict[str, Any] = {"bounds": (0.0, 1.0), "solver": clip, "return_info": True}
    previous = inv.nlp(objective, lambda p: 0.5 * p, P, **keywords)
    torch.testing.assert_close(starts[-1], 0.5 * P)
    _, info = inv.nlp(objective, torch.zeros_like(P), P, warm_start=previous, **keywords)
    torch.testing.assert_close(starts[-1], previous[0])
    assert info.start.tolist() == [-1, -1]
    with pytest.raises(inv.ConditionsError, match=r"n_starts=2 came with y0 of shape.*accepted is one guess"):
        inv.nlp(objective, torch.zeros_like(P)[:1], P, n_starts=2, **keywords)


def test_points_of_a_manifold_are_refused() -> None:
    for solve in (inv.nlp, lambda f, y0, p, **keywords: inv.NLPLayer(f, **keywords)(p, y0=y0)):
        with pytest.raises(inv.ConditionsError, match=r"nlp\(manifold=...\).*Accepted.*eq=lambda q"):
            solve(objective, P, P, bounds=(0.0, 1.0), manifold=inv.manifolds.SO3())


def test_constraints_are_measured_once() -> None:
    """With info there is the Jacobian of the constraints on top, and nothing else."""
    calls: list[str] = []

    def inequality(y: Tensor, p: Tensor) -> Tensor:
        calls.append("")
        return 1 - y

    counts = []
    for return_info in (False, True):
        calls.clear()
        p = P.clone().requires_grad_()
        inv.nlp(
            objective, torch.zeros_like(P), p, ineq=inequality, solver=lambda y0, p: p.clamp(max=1.0),
            return_info=return_info, polish=0,
        )  # fmt: skip
        counts.append(len(calls))
    assert counts[1] == counts[0] + 1


def test_warm_start_of_named_unknowns() -> None:
    split = lambda y, p: objective(torch.cat([y["first"], y["rest"]], -1), p)  # noqa: E731
    y0 = {"first": torch.zeros(2, 1), "rest": torch.zeros(2, 2)}
    solver = lambda y0, p: {"first": p[:, :1].clone(), "rest": p[:, 1:].clone()}  # noqa: E731
    previous = inv.minimize(split, y0, P, solver=solver, return_info=True)
    _, info = inv.minimize(split, y0, P, solver=solver, return_info=True, warm_start=previous)
    assert info.start.tolist() == [-1, -1]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_torch_compile_breaks_the_graph_and_nothing_else() -> None:
    """Once, at the call: were Dynamo to read the package itself, it would be slow and full of warnings."""
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        traced.extend(node.name for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def solve(p: Tensor) -> Tensor:
        y0 = torch.zeros_like(p)
        y = inv.nlp(objective, y0, p, bounds=(0.0, 1.0), solver=lambda y0, p: p.clamp(0.0, 1.0))
        return 2.0 * y

    torch._dynamo.reset()
    p = P.clone().requires_grad_()
    y = torch.compile(solve, backend=backend)(p)
    torch.testing.assert_close(y, 2.0 * P.clamp(0.0, 1.0))
    (found,) = torch.autograd.grad(y.sum(), p)
    torch.testing.assert_close(found, 2.0 * ((P > 0) & (P < 1)).double())
    assert len(traced) <= 2, traced  # zeros_like, and the product
