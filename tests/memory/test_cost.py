"""What is computed, and when: evaluations of f, backward passes, factorisations, large tensors.

All counts are exact, so that one more is noticed. A lower one is progress: write it down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.memory.layers import Picard, cubic, cubic_root, near, rand
from tests.memory.tracking import Ops
from torch import Tensor
from torch.autograd import forward_ad

import invlayer_core as inv

N = 6  # unknowns of one system: enough for J to be taken in one batched pass


class Counted:
    """The cubic, counting evaluations, and backward passes by a hook; with or without a captured tensor."""

    def __init__(self, captured: Tensor | None = None) -> None:
        self.captured = captured
        self.counts: Counter[str] = Counter()

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        self.counts["f"] += 1
        y = y + 0.0
        if y.requires_grad:
            y.register_hook(self._count_pass)
        residual = cubic(y, x)
        return residual if self.captured is None else residual + 0 * self.captured

    def _count_pass(self, cotangent: Tensor) -> None:
        self.counts["passes"] += 1


def costs(f: Counted, step: Callable[[], Any]) -> tuple[dict[str, int], Any]:
    """Calls of f, backward passes through f, LU factorisations and solves of a step; and its result."""
    f.counts.clear()
    with Ops() as ops:
        result = step()
    lu = {"lu": ops.count["linalg_lu_factor_ex"], "solve": ops.count["linalg_lu_solve"]}
    return {name: count for name, count in (f.counts | Counter(lu)).items() if count}, result


def opaque(f: Counted, **keywords: Any) -> Callable[[Tensor], Tensor]:
    solve: Callable[[Tensor], Tensor] = inv.implicit_function(f, **keywords)(cubic_root)
    return solve


# --- the forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_forward_evaluates_f_once_and_takes_no_derivative(grad: bool) -> None:
    """After the solve f is called once, to certify, whether or not a gradient will be wanted."""
    f = Counted()
    with torch.set_grad_enabled(grad):
        spent, y = costs(f, lambda: opaque(f)(rand(3, N)))
    assert spent == {"f": 1}
    assert y.requires_grad is grad


def test_forward_evaluates_f_twice_where_it_captures_tensors() -> None:
    """The second time to see which; not at all without gradients."""
    f = Counted(captured=rand(N))
    assert costs(f, lambda: opaque(f)(rand(3, N)))[0] == {"f": 2}
    with torch.no_grad():
        assert costs(f, lambda: opaque(f)(rand(3, N)))[0] == {"f": 1}


@pytest.mark.parametrize("keywords", [{"return_info": True}, {"on_failure": "nan"}], ids=str)
def test_more_information_costs_no_evaluation(keywords: dict[str, Any]) -> None:
    f = Counted()
    assert costs(f, lambda: opaque(f, **keywords)(rand(3, N)))[0] == {"f": 1}


@pytest.mark.parametrize("grad", [False, True])
def test_newton_takes_only_the_jacobians_that_it_needs(grad: bool) -> None:
    """f: once an iteration, with its Jacobian, and once to certify."""
    f, x = Counted(), rand(3, N)
    with torch.set_grad_enabled(grad):
        spent, (_, info) = costs(f, lambda: inv.root(f, near(x), x, return_info=True))
    steps = int(info.iterations.max())
    assert spent == {"f": steps + 1, "passes": steps, "lu": steps, "solve": steps}


@pytest.mark.parametrize(("how", "rounds"), [("serial", 3), ("lockstep", 1)])
def test_per_sample_solver(how: str, rounds: int) -> None:
    """Serially, every sample evaluates f for itself; in lockstep one evaluation serves all.

    Before a serial run four calls find out whether f can be evaluated for one sample alone. What every sample
    asks first, f at its start, is one evaluation either way.
    """
    f, x = Counted(), rand(3, N)
    spent, _ = costs(f, lambda: inv.root(f, near(x), x, solver=Picard(), batch=how))
    steps = 6 * rounds
    tried = 4 if how == "serial" else 0
    assert spent == {"f": tried + 1 + (2 * steps - rounds) + 1, "passes": steps}


# --- the backward -------------------------------------------------------------------------------------

# One pass for J, and one that pulls back to θ and certifies the solve.
BACKWARD = {"f": 1, "passes": 2, "lu": 1, "solve": 1}


def gradient(y: Tensor, theta: tuple[Tensor, ...], **keywords: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sin().sum(), theta, retain_graph=True, **keywords)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward(captured: bool, create_graph: bool) -> None:
    x, weight = rand(3, N), rand(N)
    f = Counted(weight if captured else None)
    y = opaque(f)(x)
    theta = (x, weight) if captured else (x,)
    assert costs(f, lambda: gradient(y, theta, create_graph=create_graph))[0] == BACKWARD


def test_all_cotangents_of_one_backward_share_one_factorisation() -> None:
    """Six of them, batched."""
    f, x = Counted(), rand(3, N)
    y = opaque(f)(x)
    cotangents = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    spent, _ = costs(f, lambda: torch.autograd.grad(y, x, cotangents, is_grads_batched=True))
    assert spent == BACKWARD | {"solve": len(cotangents)}


def test_every_backward_of_one_graph_starts_anew() -> None:
    """Today. One factorisation could serve them all, as y* and θ are the same."""
    f, x = Counted(), rand(3, N)
    y = opaque(f)(x)
    spent, _ = costs(f, lambda: [gradient(y, (x,)) for _ in range(3)])
    assert spent == {name: 3 * count for name, count in BACKWARD.items()}


def test_double_backward() -> None:
    """The derivative of the solve takes the factors that are there, and goes back through the recorded f;
    that of y* linearises f at the same point, and factorises the same J, again.
    """
    f, x = Counted(), rand(3, N)
    y = opaque(f)(x)
    (first,) = gradient(y, (x,), create_graph=True)
    spent, _ = costs(f, lambda: torch.autograd.grad(first.square().sum(), x))
    assert spent == BACKWARD | {"passes": 3, "solve": 2}


def test_forward_mode() -> None:
    """f: to certify, to see which dual tensors it captures, and to linearise. Passes: one, for J and
    for whether samples mix.
    """
    f, x = Counted(), rand(3, N)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        spent, _ = costs(f, lambda: opaque(f)(dual))
    assert spent == {"f": 3, "passes": 1, "lu": 1, "solve": 1}


def test_analytic_jacobian_saves_a_pass() -> None:
    f, x = Counted(), rand(3, N)
    y = opaque(f, jacobian=lambda y, x: torch.diag_embed(1 + 3 * y**2))(x)
    assert costs(f, lambda: gradient(y, (x,)))[0] == BACKWARD | {"passes": 1}


def test_matrix_free_backward_factorises_nothing() -> None:
    f, x = Counted(), rand(3, N)
    y = opaque(f, adjoint=inv.adjoints.Implicit(linear_solver=inv.linear.GMRES()))(x)
    spent, _ = costs(f, lambda: gradient(y, (x,)))
    assert "lu" not in spent
    assert spent["f"] == 1


def test_a_failed_sample_costs_evaluations_of_f_but_no_pass() -> None:
    """Two more: does x belong to the failed sample alone?"""
    f, x = Counted(), rand(3, N)
    lie = torch.zeros(3, 1, dtype=x.dtype)
    lie[1] = 1.0
    y = inv.implicit_function(f, on_failure="zero_grad")(lambda x: cubic_root(x) + lie)(x)
    assert costs(f, lambda: gradient(y, (x,)))[0] == BACKWARD | {"f": 3}


def test_unwanted_gradients_cost_nothing() -> None:
    """No backward at all where no arg wants a gradient."""
    f = Counted()
    spent, y = costs(f, lambda: opaque(f)(rand(3, N).detach()))
    assert spent == {"f": 1}
    assert y.grad_fn is None


# --- memory of a large shared parameter ---------------------------------------------------------------

BATCH, UNKNOWNS, HIDDEN = 64, 4, 1000
PARAMETERS = HIDDEN**2


class Wide(torch.nn.Module):
    """Four unknowns, a million parameters that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weight = torch.nn.Parameter(draw(HIDDEN, HIDDEN) / HIDDEN)
        self.into, self.out = draw(UNKNOWNS, HIDDEN), draw(HIDDEN, UNKNOWNS) / HIDDEN

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + torch.tanh((y @ self.into) @ self.weight) @ self.out - x


@pytest.fixture(scope="module")
def wide() -> tuple[Wide, Tensor, Tensor]:
    """The module, x, and y(x), attached."""
    module, x = Wide(), rand(BATCH, UNKNOWNS)
    with torch.no_grad():
        solution = inv.root(module, x.detach(), x)
    return module, x, inv.implicit_function(module)(lambda x: solution.clone())(x)


def of_a_size(ops: Ops, elements: int) -> int:
    return sum(count for size, count in ops.sizes.items() if size >= elements)


def test_backward_makes_one_tensor_of_the_size_of_the_parameters(wide: tuple[Wide, Tensor, Tensor]) -> None:
    """The gradient itself. A dense sensitivity ∂F/∂θ would have n or even B n times as many elements."""
    module, x, y = wide
    with Ops() as ops:
        gradient(y, (x, module.weight))
    assert ops.largest == PARAMETERS
    assert of_a_size(ops, PARAMETERS) == 1


def test_double_backward_makes_few_of_them(wide: tuple[Wide, Tensor, Tensor]) -> None:
    module, x, y = wide
    first = gradient(y, (x, module.weight), create_graph=True)
    with Ops() as ops:
        torch.autograd.grad(sum(g.square().sum() for g in first), (x, module.weight))
    assert ops.largest == PARAMETERS
    assert of_a_size(ops, PARAMETERS) <= 9


def test_forward_makes_none_of_them(wide: tuple[Wide, Tensor, Tensor]) -> None:
    module, x, y = wide
    with Ops() as ops:
        inv.implicit_function(module)(lambda x: y.detach().clone())(x)
    assert ops.largest <= BATCH * HIDDEN


def test_a_dense_sensitivity_is_seen(wide: tuple[Wide, Tensor, Tensor]) -> None:
    """The control: ∂F/∂θ of one sample, row by row."""
    module, x, y = wide
    with Ops() as ops:
        residual = module(y.detach()[0], x.detach()[0])
        torch.autograd.grad(
            residual, module.weight, torch.eye(UNKNOWNS, dtype=x.dtype), is_grads_batched=True
        )
    assert ops.largest == UNKNOWNS * PARAMETERS


def test_one_small_system_takes_its_sensitivity_along_only_while_that_is_small() -> None:
    """For one system, ∂F/∂θ of up to 4096 elements saves a pass; a million parameters are not formed."""
    module, x = Wide(), rand(UNKNOWNS)
    y = inv.root(module, x.detach(), x)
    with Ops() as ops:
        gradient(y, (x, module.weight))
    assert ops.largest == PARAMETERS
