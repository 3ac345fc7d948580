"""Memory is flat over iterations, and everything is freed the moment that the output is.

Garbage collection is off throughout: what only a collection would free counts as a leak here, because a graph
in a reference cycle keeps its tensors, on a GPU too, until Python happens to collect.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import pytest
import torch
from tests.memory.layers import LAYERS, Breakdown, Picard, Weighted, cubic, near, newton, rand
from tests.memory.tracking import Ops, no_collection, tensors_alive
from torch import Tensor

import invlayer_core as inv

ITERATIONS = 300
FEWER = 30  # where an iteration takes long
WATCHED = 5  # iterations at the start, and at the end, of which every storage is followed

Step = Callable[[Callable[[], Tensor], tuple[Tensor, ...]], None]


def forward(layer: Callable[[], Tensor], theta: tuple[Tensor, ...]) -> None:
    layer()


def backward(layer: Callable[[], Tensor], theta: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(layer().sin().sum(), theta)


def create_graph(layer: Callable[[], Tensor], theta: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(layer().sin().sum(), theta, create_graph=True)


def double_backward(layer: Callable[[], Tensor], theta: tuple[Tensor, ...]) -> None:
    first = torch.autograd.grad(layer().sin().sum(), theta, create_graph=True)
    torch.autograd.grad(sum(gradient.square().sum() for gradient in first), theta)


def accumulate(layer: Callable[[], Tensor], theta: tuple[Tensor, ...]) -> None:
    """As in training."""
    for tensor in theta:
        tensor.grad = None
    layer().sin().sum().backward()


def watched(step: Callable[[], None]) -> list[int]:
    """Live storages after each of a few iterations, of those that these made."""
    with Ops() as ops:
        counts = []
        for _ in range(WATCHED):
            step()
            counts.append(ops.alive())
    return counts


def assert_flat(step: Callable[[], None], iterations: int = ITERATIONS) -> None:
    """No iteration leaves a storage or a tensor behind that the one before did not."""
    step()
    with no_collection():
        at_start = watched(step)
        step()
        tensors = tensors_alive()
        for _ in range(iterations - 2 * WATCHED - 2):
            step()
        assert tensors_alive() == tensors
        at_end = watched(step)
    assert len(set(at_start)) == len(set(at_end)) == 1
    assert at_start == at_end


@pytest.mark.parametrize("step", [forward, backward, create_graph])
@pytest.mark.parametrize("name", LAYERS)
def test_memory_is_flat(name: str, step: Step) -> None:
    x = rand(3, 2)
    iterations = ITERATIONS if name in ("newton", "opaque", "failing") else FEWER
    assert_flat(lambda: step(lambda: LAYERS[name](cubic, x), (x,)), iterations)


@pytest.mark.parametrize("step", [forward, backward, create_graph])
def test_memory_is_flat_with_captured_parameters(step: Step) -> None:
    module, x = Weighted(), rand(3, 2)
    assert_flat(lambda: step(lambda: newton(module, x), (x, module.weight)))


@pytest.mark.parametrize("step", [double_backward, accumulate])
def test_memory_is_flat_in_training(step: Step) -> None:
    module, x = Weighted(), rand(3, 2)
    assert_flat(lambda: step(lambda: newton(module, x), (x, module.weight)), FEWER)


def test_memory_is_flat_over_errors() -> None:
    """Layers that are told to raise leave nothing behind either, once the error is dropped."""
    x = rand(3, 2)

    def step() -> None:
        with contextlib.suppress(inv.ConvergenceError):
            inv.root(cubic, torch.zeros_like(x).detach(), x, options={"maxiter": 1})

    assert_flat(step)


# --- freed at once ------------------------------------------------------------------------------------


class Conditions:
    """Conditions whose end can be seen: ``weakref`` to them dies with the graph."""

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        return cubic(y, x)


def outlives(run: Callable[[Conditions], object]) -> bool:
    """Whether conditions still live after a run of which nothing is kept (a first one warms caches)."""
    run(Conditions())
    with no_collection():
        conditions = Conditions()
        end = weakref.ref(conditions)
        run(conditions)
        del conditions
        return end() is not None


@pytest.mark.parametrize("step", [forward, backward, create_graph, double_backward])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_outlives_the_output(name: str, step: Step) -> None:
    x = rand(3, 2)
    assert not outlives(lambda f: step(lambda: LAYERS[name](f, x), (x,)))


def test_output_itself_dies_at_once() -> None:
    x = rand(3, 2)
    with no_collection():
        y = newton(cubic, x)
        gradient = torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0]
        ends = weakref.ref(y), weakref.ref(y.grad_fn), weakref.ref(gradient)
        del y, gradient
        assert [end() for end in ends] == [None, None, None]


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian, torch.vmap])
def test_nothing_outlives_a_transform(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    x = rand(3, 2).detach()
    assert not outlives(lambda f: transform(lambda x: newton(f, x))(x))


def test_nothing_outlives_a_singular_jacobian() -> None:
    x = rand(3, 2)

    def run(f: Conditions) -> None:
        y = inv.implicit_function(lambda y, x: (y - x) ** 2 + 0 * f(y, x))(torch.clone)(x)
        with pytest.raises(inv.SingularJacobianError, match="sample 0"):
            y.sum().backward()

    assert not outlives(run)


@pytest.mark.parametrize("how", ["serial", "lockstep"])
def test_nothing_outlives_a_solver_that_raises_in_a_sample(how: str) -> None:
    x = rand(3, 2)

    def run(f: Conditions) -> None:
        inv.root(f, near(x), x, solver=Picard(raises_in=1), batch=how, on_failure="nan")

    assert not outlives(run)


def test_nothing_outlives_a_batched_solver_that_raises() -> None:
    x = rand(3, 2)
    assert not outlives(lambda f: inv.root(f, near(x), x, solver=Breakdown(), on_failure="nan"))


# --- controls -----------------------------------------------------------------------------------------


def test_a_kept_graph_is_seen() -> None:
    kept: list[Tensor] = []
    x = rand(3, 2)
    with pytest.raises(AssertionError, match="assert"):
        assert_flat(lambda: kept.append(newton(cubic, x)), 20)


def test_a_storage_that_only_the_graph_holds_is_seen() -> None:
    """A chain of graphs: Python knows one tensor of it, autograd all."""
    state = [rand(3, 2)]

    def step() -> None:
        state[0] = newton(cubic, state[0])

    step()
    with no_collection():
        counts = watched(step)
    assert counts == sorted(set(counts))


def test_a_reference_cycle_is_seen() -> None:
    x = rand(3, 2)

    def run(f: Conditions) -> None:
        cycle: list[object] = [newton(f, x)]
        cycle.append(cycle)

    assert outlives(run)
