"""Where a solve starts: guesses made of the args, warm starts, several starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

FLOAT = torch.float64


def f(y: Tensor, a: Tensor) -> Tensor:
    return y + y**3 - a


def slope(y: Tensor) -> Tensor:
    """∂y/∂a of ``f``, by hand."""
    return 1 / (1 + 3 * y.detach() ** 2)


def square(y: Tensor, a: Tensor) -> Tensor:
    """Without a root where a < 0; two of them where a > 0."""
    return y * y - a


@dataclass(frozen=True)
class Newton(inv.Solver):
    """Newton's method in NumPy, which notes where it starts and claims what it is told to."""

    claim: bool = True
    steps: int = 30
    seen: list[Any] = field(default_factory=list)

    def solve(self, problem: Any, y0: np.ndarray, options: Any) -> inv.SolverResult:
        self.seen.append((problem.index, *y0.tolist()))
        y, step = y0, 0
        while step < self.steps and np.abs(residual := problem.residual(y)).max() >= 1e-13:
            y, step = y - np.linalg.solve(problem.jacobian(y), residual), step + 1
        return inv.SolverResult(y, self.claim, step, f"from {y0}", {"first": y0.tolist()})


def plain_newton(y: Tensor, a: Tensor) -> Tensor:
    for _ in range(30):
        y = y - (y * y - a) / (2 * y)
    return y


# Guesses made of the args


@pytest.mark.parametrize("solver", ["torch.newton", Newton(), lambda y0, a: plain_newton(y0, a)])
def test_a_guess_is_made_of_the_args(solver: Any) -> None:
    a = torch.tensor([[4.0, 9.0], [16.0, 25.0]], dtype=FLOAT, requires_grad=True)
    y = inv.root(square, lambda a: -a / 2, a, solver=solver)
    torch.testing.assert_close(y.detach(), -a.detach().sqrt(), rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, -0.5 / a.detach().sqrt(), rtol=1e-13, atol=0)


def test_a_guess_is_given_the_args_as_they_came_and_gets_no_gradient() -> None:
    guess = torch.nn.Linear(2, 2).double()
    given: list[Any] = []

    def start(a: Tensor, rest: dict) -> Tensor:
        given.append(rest)
        return guess(a)

    a = torch.ones(3, 2, dtype=FLOAT, requires_grad=True)
    rest = {"shift": 0.5, "name": "x"}
    layer = inv.RootLayer(lambda y, a, rest: f(y, a) - rest["shift"])
    layer(a, rest, y0=start).sum().backward()
    assert given == [rest]
    assert guess.weight.grad is None
    assert a.grad is not None
    assert layer(a, rest, y0=lambda a, rest: torch.zeros_like(a)).shape == (3, 2)


def test_a_guess_under_transforms() -> None:
    a = torch.linspace(0.5, 2, 6, dtype=FLOAT).reshape(3, 2)

    def layer(a: Tensor) -> Tensor:
        return inv.root(f, lambda a: a / 2, a)

    expected = slope(layer(a))
    torch.testing.assert_close(torch.func.vmap(layer)(a), layer(a), rtol=1e-14, atol=0)
    jacobians = [torch.func.vmap(way(layer))(a) for way in (torch.func.jacrev, torch.func.jacfwd)]
    for jacobian in jacobians:
        torch.testing.assert_close(jacobian.diagonal(dim1=1, dim2=2), expected, rtol=1e-13, atol=0)


def test_a_structured_guess() -> None:
    y = inv.root(
        lambda y, a: {"p": y["p"] ** 2 - a, "q": y["q"] - y["p"]},
        lambda a: {"p": a, "q": torch.zeros_like(a)},
        torch.tensor([[4.0]], dtype=FLOAT),
    )
    assert (float(y["p"]), float(y["q"])) == pytest.approx((2, 2))


def test_a_guess_that_is_no_tensor() -> None:
    with pytest.raises(inv.ConditionsError, match=r"root: y0"):
        inv.root(f, lambda a: "zero", torch.ones(2, dtype=FLOAT))


# Warm starts


@pytest.mark.parametrize(
    "solver",
    [
        "torch.newton",
        Newton(),
        pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy")),
        pytest.param("scipy.root", marks=pytest.mark.plugin("invlayer-scipy")),
    ],
)
def test_a_slow_sequence_takes_fewer_iterations_and_has_the_same_gradients(solver: Any) -> None:
    layer = inv.RootLayer(f, solver=solver, return_info=True, polish=1)
    cold, previous, counts = torch.zeros(4, 3, dtype=FLOAT), None, []
    base = torch.linspace(5, 60, 12, dtype=FLOAT).reshape(4, 3)
    for step in range(5):
        a = (base * (1 + 0.002 * step)).requires_grad_()
        unaided, info = layer(a, y0=cold)
        previous = layer(a, y0=cold, warm_start=previous)
        gradients = [torch.autograd.grad(y.square().sum(), a)[0] for y in (unaided, previous[0])]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
        exact = 2 * unaided.detach() * slope(unaided)
        torch.testing.assert_close(gradients[1], exact, rtol=1e-12, atol=0)
        counts.append((int(info.iterations.sum()), int(previous[1].iterations.sum())))
        assert previous[1].start.tolist() == [-1 if step else 0] * 4
    assert counts[0][0] == counts[0][1]
    assert all(warm < 0.6 * alone for alone, warm in counts[1:]), counts


@pytest.mark.parametrize("on_failure", ["nan", "zero_grad", "warn"])
@pytest.mark.filterwarnings("ignore::invlayer_core.ConvergenceWarning")
def test_a_failed_sample_never_becomes_the_next_start(on_failure: Any) -> None:
    cold, solver = torch.full((3, 1), 1.5, dtype=FLOAT), Newton()
    sound, sick = (torch.tensor([[4.0], [a], [9.0]], dtype=FLOAT) for a in (2.0, -1.0))
    layer = inv.RootLayer(square, solver=solver, on_failure=on_failure, return_info=True, batch="serial")
    previous = layer(sick, y0=cold)
    assert previous[1].ok.tolist() == [True, False, True]
    solver.seen.clear()
    again = layer(sound, y0=cold, warm_start=previous)
    assert solver.seen == [(0, float(previous[0][0])), (1, 1.5), (2, float(previous[0][2]))]
    assert again[1].start.tolist() == [-1, 0, -1]
    assert torch.equal(again[0][1], inv.root(square, cold, sound, solver=solver)[1])
    solver.seen.clear()
    layer(sound, y0=cold, warm_start=again)
    assert [seen[1] for seen in solver.seen] == again[0].flatten().tolist()


def test_a_warm_start_changes_nothing_that_it_is_given() -> None:
    a = torch.tensor([[1.0], [2.0]], dtype=FLOAT, requires_grad=True)
    layer, cold = (
        inv.FixedPointLayer(lambda y, a: y - f(y, a) / 8, return_info=True),
        torch.zeros(2, 1, dtype=FLOAT),
    )
    previous = layer(a, y0=cold)
    value = previous[0].detach().clone()
    once, twice = (layer(a + 0.1, y0=cold, warm_start=previous) for _ in range(2))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(previous[0], value)
    (gradient,) = torch.autograd.grad(once[0].sum(), a)  # and nothing flows into the call before
    torch.testing.assert_close(gradient, slope(once[0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "event_dims"),
    [((), 0), ((3,), 0), ((3,), 1), ((3, 3), 1), ((2, 3, 2), 1), ((2, 3, 2), 2), ((0, 2), 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT, torch.float16])
def test_warm_starts_of_every_shape(shape: Any, event_dims: int, dtype: torch.dtype) -> None:
    a = (
        torch.linspace(1, 2, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
        .reshape(shape)
        .to(dtype)
    )
    keywords: dict = {"event_dims": event_dims, "return_info": True}
    previous = inv.root(f, torch.zeros(shape, dtype=dtype), a, **keywords)
    y, info = inv.root(f, torch.zeros(shape, dtype=dtype), a, warm_start=previous, **keywords)
    assert y.dtype == dtype
    assert info.start.shape == info.ok.shape
    assert bool((info.start == -1).all())
    assert info.iterations.numel() == 0 or int(info.iterations.max()) <= (2 if dtype is torch.float16 else 1)


def test_a_structured_warm_start() -> None:
    def conditions(y: dict, a: Tensor) -> dict:
        return {"z": y["z"] ** 2 - a * 1j, "r": y["r"] - y["z"].abs()}

    a = torch.tensor([[4.0, 1.0], [9.0, 2.0]], dtype=FLOAT)
    y0 = {"z": torch.ones(2, 2, dtype=torch.complex128), "r": torch.ones(2, 2, dtype=FLOAT)}
    layer = inv.RootLayer(conditions, return_info=True)
    previous = layer(a, y0=y0)
    y, info = layer(a, y0=y0, warm_start=previous)
    assert info.start.tolist() == [-1, -1]
    assert int(info.iterations.max()) <= 1
    torch.testing.assert_close(y["r"], a.sqrt(), rtol=1e-12, atol=0)
    with pytest.raises(inv.ConditionsError, match=r"warm_start"):
        layer(a, y0=y0, warm_start=({"z": y0["z"]}, previous[1]))


def test_a_warm_start_shared_by_all_slices_of_vmap() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=FLOAT)
    previous = inv.root(f, torch.zeros(2, dtype=FLOAT), a[0], return_info=True)

    def layer(a: Tensor) -> Tensor:
        return inv.root(f, torch.zeros(2, dtype=FLOAT), a, warm_start=previous)

    torch.testing.assert_close(
        torch.func.vmap(torch.func.jacrev(layer))(a).diagonal(dim1=1, dim2=2),
        slope(inv.root(f, torch.zeros(2, 2, dtype=FLOAT), a)),
        rtol=1e-12, atol=0,
    )  # fmt: skip
    batch = inv.root(f, torch.zeros(2, 2, dtype=FLOAT), a, return_info=True)
    with pytest.raises(inv.ConditionsError, match=r"info for a batch \(2,\); accepted is y in the shape"):
        torch.func.vmap(lambda a: inv.root(f, torch.zeros(2, dtype=FLOAT), a, warm_start=batch))(a)


def test_warm_starts_break_a_graph_and_keep_the_numbers() -> None:
    layer = inv.RootLayer(f, return_info=True)
    a, cold = torch.tensor([[1.0, 2.0]], dtype=FLOAT), torch.zeros(1, 2, dtype=FLOAT)
    previous = layer(a, y0=cold)
    compiled = torch.compile(lambda a: layer(a, y0=cold, warm_start=previous)[0] * 2, backend="eager")
    assert torch.equal(compiled(a), layer(a, y0=cold, warm_start=previous)[0] * 2)
    starts = torch.stack([cold, cold + 1])
    silent = inv.RootLayer(f, n_starts=2)
    assert torch.equal(
        torch.compile(lambda a: silent(a, y0=starts), backend="eager")(a), silent(a, y0=starts)
    )


@pytest.mark.parametrize(
    ("warm_start", "message"),
    [
        (torch.zeros(2, 1), r"root: warm_start is a Tensor; accepted is None, or the pair \(y, info\)"),
        ((torch.zeros(2, 1), None), r"root: warm_start is a tuple; accepted is None, or the pair"),
        ("shape", r"warm_start holds y of shape \(3, 1\).*accepted is y in the shape of the start, \(2, 1\)"),
        ("event", r"info for a batch \(2, 1\).*with info for a batch \(2,\)"),
    ],
)
def test_bad_warm_starts(warm_start: Any, message: str) -> None:
    a = torch.ones(2, 1, dtype=FLOAT)
    if warm_start == "shape":
        warm_start = inv.root(
            f, torch.zeros(3, 1, dtype=FLOAT), torch.ones(3, 1, dtype=FLOAT), return_info=True
        )
    elif isinstance(warm_start, str):
        warm_start = inv.root(f, torch.zeros_like(a), a, event_dims=0, return_info=True)
    with pytest.raises(inv.ConditionsError, match=message):
        inv.root(f, torch.zeros_like(a), a, warm_start=warm_start)


# Several starts

STARTS = torch.tensor([[[-1.0], [0.0]], [[0.0], [1.0]], [[2.0], [1.0]], [[3.0], [-1.0]]], dtype=FLOAT)


def steep(y: Tensor, a: Tensor) -> Tensor:
    """Newton's method finds the one root, (1 + a)², from positive starts only: y = 0 has no derivative."""
    return torch.where(y > 0, y.clamp(min=1e-300).sqrt() - 1 - a, -1.0 + 0 * a)


SOLVERS = [
    Newton(),
    "torch.newton",
    pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy")),
]


@pytest.mark.parametrize("batch", ["serial", "lockstep", "threads"])
def test_starts_are_tried_in_order_until_one_solves(batch: Any) -> None:
    solver = Newton()
    a = torch.tensor([[4.0], [9.0]], dtype=FLOAT)
    starts = torch.tensor([[[0.0], [1.0]], [[1.0], [-1.0]], [[-1.0], [7.0]]], dtype=FLOAT)
    y, info = inv.root(square, starts, a, solver=solver, n_starts=3, batch=batch, return_info=True)
    assert y.flatten().tolist() == pytest.approx([2, 3], rel=1e-14)  # not −2: start 1 came first
    assert info.start.tolist() == [1, 0]
    assert info.status == (inv.Status.CONVERGED,) * 2
    assert sorted(solver.seen) == [(0, 0.0), (0, 1.0), (1, 1.0), (1, float(y[1]))]  # solved: it rests there
    assert (info.aux[0], info.message[1]) == ({"first": [1.0]}, "from [1.]")
    for sample, start in enumerate((1, 0)):
        alone = inv.root(square, starts[start], a, solver=Newton(), batch=batch, on_failure="nan")
        assert torch.equal(alone[sample], y[sample])


@pytest.mark.parametrize("solver", SOLVERS)
def test_derivatives_are_those_at_the_root_taken(solver: Any) -> None:
    a = torch.tensor([[0.5], [0.25]], dtype=FLOAT, requires_grad=True)

    def layer(a: Tensor) -> Tensor:
        return inv.root(steep, STARTS, a, solver=solver, n_starts=4)

    y, info = inv.root(steep, STARTS, a, solver=solver, n_starts=4, return_info=True)
    alone = [inv.root(steep, y0, a, solver=solver, on_failure="nan").isfinite() for y0 in STARTS]
    first = torch.stack(alone).flatten(1).int().argmax(0)
    assert info.start.tolist() == first.tolist()
    assert solver == "scipy.fsolve" or first.tolist() == [2, 1]
    torch.testing.assert_close(y.detach(), (1 + a.detach()) ** 2, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, 2 * (1 + a.detach()), rtol=1e-10, atol=0)
    assert torch.autograd.gradgradcheck(layer, (a,))


@pytest.mark.parametrize("solver", [*SOLVERS, lambda y0, a: torch.where(y0 > 0, (1 + a) ** 2, torch.nan)])
def test_several_starts_under_transforms(solver: Any) -> None:
    """Each slice of vmap tries its own starts, mapped or not; also nested, with captured tensors."""
    scale = torch.tensor([0.5], dtype=FLOAT, requires_grad=True)
    a = torch.tensor([[1.0], [0.5], [2.0]], dtype=FLOAT)

    def layer(a: Tensor, starts: Tensor = STARTS[:, 0]) -> Tensor:
        return inv.root(lambda y, a: steep(y, a) + 0 * scale, starts, a, solver=solver, n_starts=4)

    exact, derivative = (1 + a) ** 2, 2 * (1 + a)
    close = lambda x, y: torch.testing.assert_close(x.detach(), y, rtol=1e-10, atol=0)  # noqa: E731
    close(torch.func.vmap(layer)(a), exact)
    close(torch.func.vmap(layer, in_dims=(0, 2))(a, STARTS[:, 0].unsqueeze(-1).expand(4, 1, 3)), exact)
    close(torch.func.vmap(torch.func.vmap(layer))(a.reshape(3, 1, 1)).reshape(3, 1), exact)
    close(torch.func.vmap(torch.func.jacrev(layer))(a).reshape(3, 1), derivative)
    close(torch.func.vmap(torch.func.jacfwd(layer))(a).reshape(3, 1), derivative)
    close(torch.func.jacrev(lambda a: torch.func.vmap(layer)(a).sum())(a), derivative)


def test_a_liar_does_not_end_the_search() -> None:
    solver = Newton(steps=1)
    y, info = inv.root(
        square, torch.tensor([[1.5], [2.0]], dtype=FLOAT), torch.tensor([4.0], dtype=FLOAT), solver=solver,
        n_starts=2, return_info=True,
    )  # fmt: skip
    assert (float(y), int(info.start)) == (2, 1)


def test_without_a_solution_the_nearest_miss_is_reported() -> None:
    a = torch.tensor([[-1.0], [4.0]], dtype=FLOAT)
    starts = torch.tensor([[[9.0], [1.0]], [[0.25], [1.0]], [[5.0], [1.0]]], dtype=FLOAT)
    y, info = inv.root(
        square, starts, a, solver=lambda y0, a: torch.where(a < 0, y0, a.sqrt()), n_starts=3,
        on_failure="zero_grad", return_info=True,
    )  # fmt: skip
    assert info.start.tolist() == [1, 0]
    assert info.ok.tolist() == [False, True]
    assert y.flatten().tolist() == [0.25, 2]
    assert float(info.residual[0]) == 1.0625
    with pytest.raises(inv.ConvergenceError, match=r"1 of 2 samples.*\n  sample 0: FALSE_CONVERGENCE"):
        inv.root(square, starts, a, solver=lambda y0, a: torch.where(a < 0, y0, a.sqrt()), n_starts=3)


def test_a_hopeless_sample_changes_no_other() -> None:
    starts = torch.tensor([0.7, 1.1, 1.9], dtype=FLOAT).reshape(3, 1, 1).expand(3, 3, 1)
    a = torch.tensor([[2.0], [3.0], [5.0]], dtype=FLOAT)
    sick = a.clone()
    sick[1] = -1
    for solver in ("torch.newton", Newton()):
        sound, other = (
            inv.root(square, starts, args, solver=solver, n_starts=3, on_failure="nan") for args in (a, sick)
        )
        assert torch.equal(sound[[0, 2]], other[[0, 2]])


def test_a_plain_function_is_called_once_per_start() -> None:
    calls: list[Tensor] = []

    def solver(y0: Tensor, a: Tensor) -> Tensor:
        calls.append(y0.clone())
        return torch.where(y0 > 0, a.sqrt(), y0)

    a = torch.tensor([[4.0], [9.0]], dtype=FLOAT)
    starts = torch.tensor([[[-1.0], [1.0]], [[1.0], [-5.0]], [[1.0], [1.0]]], dtype=FLOAT)
    y, info = inv.root(square, starts, a, solver=solver, n_starts=3, return_info=True)
    assert [call.flatten().tolist() for call in calls] == [[-1, 1], [1, 3]]
    assert (y.flatten().tolist(), info.start.tolist()) == ([2, 3], [1, 0])


def test_a_warm_start_takes_the_place_of_the_first_start() -> None:
    solver, starts = Newton(), torch.tensor([[[1.0], [0.0]], [[5.0], [6.0]]], dtype=FLOAT)
    a = torch.tensor([[4.0], [9.0]], dtype=FLOAT)
    keywords: dict = {
        "solver": solver,
        "n_starts": 2,
        "return_info": True,
        "on_failure": "nan",
        "batch": "serial",
    }
    previous = inv.root(square, starts[:, :, :], torch.tensor([[4.0], [-1.0]], dtype=FLOAT), **keywords)
    solver.seen.clear()
    y, info = inv.root(square, starts, a, warm_start=previous, **keywords)
    assert solver.seen[:2] == [(0, float(previous[0][0])), (1, 0.0)]
    assert info.start.tolist() == [-1, 1]
    assert y.flatten().tolist() == pytest.approx([2, 3], rel=1e-14)


def test_where_a_warm_start_fails_the_next_start_is_tried() -> None:
    def solver(y0: Tensor, a: Tensor) -> Tensor:
        return torch.where(y0 > 2.5, a.sqrt(), y0)

    previous = inv.root(
        square, torch.tensor([2.0], dtype=FLOAT), torch.tensor([4.0], dtype=FLOAT), return_info=True
    )
    starts, a = torch.tensor([[3.0], [5.0]], dtype=FLOAT), torch.tensor([9.0], dtype=FLOAT)
    y, info = inv.root(square, starts, a, solver=solver, n_starts=2, warm_start=previous, return_info=True)
    assert (float(y), int(info.start)) == (3, 1)


def wells(y: Tensor, a: Tensor) -> Tensor:
    """Minima near −1 and 1, of which ``a`` lowers the second, and a maximum between them."""
    return ((y**2 - 1) ** 2 - a * y).sum(-1)


def descent(y: Tensor, a: Tensor) -> Tensor:
    for _ in range(500):
        y = y - 0.1 * (4 * y * (y**2 - 1) - a)
    return y


def test_of_several_minima_the_lowest_is_taken() -> None:
    a = torch.tensor([[0.1], [-0.1]], dtype=FLOAT, requires_grad=True)
    starts = torch.tensor([-1.5, 1.5, 0.5], dtype=FLOAT).reshape(3, 1, 1).expand(3, 2, 1)
    y, info = inv.minimize(wells, starts, a, solver=descent, n_starts=3, return_info=True)
    assert info.start.tolist() == [1, 0]
    assert y.sign().flatten().tolist() == [1, -1]
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, 1 / (12 * y.detach() ** 2 - 4), rtol=1e-9, atol=0)
    slices = torch.func.vmap(lambda a: inv.minimize(wells, starts[:, 0], a, solver=descent, n_starts=3))(a)
    assert torch.equal(slices, y)


@pytest.mark.parametrize("structured", [False, True])
def test_optimisation_starts_from_guesses_and_solutions(structured: bool) -> None:
    def objective(y: Any, a: Tensor) -> Tensor:
        return wells(y["y"] if structured else y, a)

    seen: list[Tensor] = []

    def solver(y0: Any, a: Tensor) -> Any:
        seen.append(y0["y"] if structured else y0)
        y = descent(seen[-1], a)
        return {"y": y} if structured else y

    guess = (lambda a: {"y": a.sign()}) if structured else (lambda a: a.sign())
    a = torch.tensor([[0.1], [-0.1]], dtype=FLOAT)
    layer = inv.MinimizeLayer(objective, solver=solver, return_info=True)
    previous = layer(a, y0=guess)
    assert torch.equal(seen[-1], a.sign())
    _, info = layer(a, y0=guess, warm_start=previous)
    assert torch.equal(seen[-1], previous[0]["y"] if structured else previous[0])
    assert info.start.tolist() == [-1, -1]


def test_a_warm_start_of_a_program_with_multipliers() -> None:
    seen: list[Tensor] = []

    def solver(y0: Tensor, a: Tensor) -> Tensor:
        seen.append(y0)
        return 0 * y0 + 0.5

    a = torch.tensor([[0.1]], dtype=FLOAT)
    layer = inv.NLPLayer(wells, bounds=(-2.0, 0.5), solver=solver, return_multipliers=True)
    previous = layer(a, y0=lambda a: a.sign(), return_info=True)
    _, info = layer(a, y0=a.sign(), return_info=True, warm_start=previous)
    assert [float(start) for start in seen] == [1, 0.5]
    assert info.start.tolist() == [-1]
    with pytest.raises(inv.ConditionsError, match=r"nlp: n_starts=2 came with y0 of shape"):
        layer(a, y0=a.sign(), n_starts=2)
    with pytest.raises(inv.ConditionsError, match=r"nlp: warm_start is a Tensor"):
        layer(a, y0=a.sign(), warm_start=a)


def test_several_structured_starts() -> None:
    starts = {"p": torch.tensor([[0.0], [3.0]], dtype=FLOAT), "q": torch.zeros(2, 1, dtype=FLOAT)}
    y, info = inv.root(
        lambda y, a: {"p": y["p"] ** 2 - a, "q": y["q"] - y["p"]},
        lambda a: starts,
        torch.tensor([4.0], dtype=FLOAT),
        n_starts=2,
        return_info=True,
    )
    assert (float(y["p"]), float(y["q"]), int(info.start)) == (2, 2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: inv.root(f, a, a, n_starts=0), r"n_starts=0: accepted is an integer >= 1"),
        (lambda a: inv.root(f, a, a, n_starts=True), r"n_starts=True: accepted is an integer"),
        (lambda a: inv.root(f, a, a, n_starts=2.0), r"n_starts=2.0: accepted is an integer"),
        (
            lambda a: inv.root(f, a, a, n_starts=4),
            r"root: n_starts=4 came with y0 of shape \(3, 1\); accepted is one guess after .*\(4, \*batch",
        ),
        (lambda a: inv.inverse(a, torch.asin, f=torch.sin, n_starts=2), r"start from a guess y0"),
        (
            lambda a: inv.implicit_function(f, warm_start=(a, None)),
            r"n_starts= and warm_start= are for kinds",
        ),
        (lambda a: inv.starts_between(a, a, 0), r"starts_between\(n_starts=0\): accepted is an integer >= 1"),
        (lambda a: inv.starts_between(0, 1, 2), r"dtypes torch.int64 and torch.int64; accepted are real"),
    ],
)
def test_bad_numbers_of_starts(call: Any, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        call(torch.zeros(3, 1, dtype=FLOAT))


def test_starts_between_fill_the_box_evenly_and_repeatably() -> None:
    lo, hi = torch.tensor([[-1.0, 0.0], [5.0, 6.0]], dtype=FLOAT), torch.tensor([1.0, 8.0], dtype=FLOAT)
    starts = inv.starts_between(lo, hi, 16)
    assert starts.shape == (16, 2, 2)
    assert starts.dtype == FLOAT
    unit = (starts - lo) / (hi - lo)
    torch.testing.assert_close(unit[:, 0], unit[:, 1], rtol=1e-12, atol=1e-12)
    for dim in range(2):  # one in each sixteenth: what makes a Sobol sequence
        assert sorted((unit[:, 0, dim] * 16).long().tolist()) == list(range(16))
    before = torch.get_rng_state()
    assert torch.equal(starts, inv.starts_between(lo, hi, 16))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(starts, inv.starts_between(lo, hi, 16, seed=1))
    assert inv.starts_between(0.0, 1.0, 3).shape == (3,)
    assert inv.starts_between(torch.zeros(0, dtype=FLOAT), torch.ones(0, dtype=FLOAT), 3).shape == (3, 0)
