"""``compile=True``: the numbers of the ordinary rule, which takes over wherever the compiled one has none."""

from __future__ import annotations

import functools
import gc
import shutil
import weakref

import pytest
import torch
from tests import opaque
from torch import Tensor

import invlayer_core as inv
from invlayer_core.adjoints import compiled
from invlayer_core.adjoints.rule import ImplicitRule

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def quickly(monkeypatch):
    """Everything but the C++ compiler: what inductor adds takes seconds."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


class Cubic(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)

    def forward(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return y + 0.2 * torch.tanh(self.inner(y)) * a - b


def layers_of(kind: str, **keywords) -> torch.nn.Module:
    torch.manual_seed(0)
    return {
        "root": lambda: inv.RootLayer(opaque.root_conditions, solver=opaque.opaque_root, **keywords),
        "jacobian": lambda: inv.RootLayer(
            opaque.root_conditions, solver=opaque.opaque_root, jacobian=opaque.root_jacobian, **keywords
        ),
        "fixed_point": lambda: inv.FixedPointLayer(
            opaque.fixed_point_map, solver=opaque.opaque_fixed_point, **keywords
        ),
        "module": lambda: inv.RootLayer(Cubic(), **keywords),
        "inverse": lambda: inv.InverseLayer(opaque.opaque_inverse, f=opaque.forward_map, **keywords),
    }[kind]()


def run(layer: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    if isinstance(layer, inv.InverseLayer):
        return layer(a * b)
    return layer(a, b, y0=torch.zeros_like(b))


def operands(*batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(batch))
    return [(0.5 + torch.rand(*shape, 3, generator=generator)).requires_grad_() for shape in ((), batch)]


def gradients(layer: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    y = run(layer, *tensors)
    return torch.autograd.grad((y * y.sin()).sum(), [*tensors, *layer.parameters()])


def rule_of(layer: torch.nn.Module) -> compiled._CompiledRule:
    return compiled._RULES[getattr(layer, "T", None) or layer.f][""]


KINDS = ("root", "jacobian", "fixed_point", "module", "inverse")


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        ("root", ((4,), (2,))),
        ("module", ((4,), (), (2, 3))),
        pytest.param("jacobian", ((4,), (2,), (), (2, 3)), marks=pytest.mark.slow),
        pytest.param("fixed_point", ((4,), (2,), (), (2, 3)), marks=pytest.mark.slow),
        pytest.param("inverse", ((4,), (2,), (), (2, 3)), marks=pytest.mark.slow),
    ],
)
def test_first_derivatives_are_those_of_the_ordinary_rule(kind, batches, quickly, monkeypatch):
    fast, eager = layers_of(kind, compile=True), layers_of(kind)
    expected = [gradients(eager, *operands(*batch)) for batch in batches]
    monkeypatch.setattr(ImplicitRule, "_linearize", None)  # the ordinary rule is away
    for batch, values in zip(batches, expected, strict=True):
        torch.testing.assert_close(gradients(fast, *operands(*batch)), values, rtol=1e-13, atol=1e-14)
    assert not rule_of(fast).failed


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_gives_the_same(kind):
    fast, eager = layers_of(kind, compile=True), layers_of(kind)
    for batch in ((4,), (2,)):
        values = gradients(eager, *operands(*batch))
        torch.testing.assert_close(gradients(fast, *operands(*batch)), values, rtol=1e-12, atol=1e-13)
    assert not rule_of(fast).failed


def test_what_changes_in_the_conditions_is_seen(quickly):
    fast, eager = layers_of("module", compile=True), layers_of("module")
    for layer in (fast, eager):
        gradients(layer, *operands(4))
        with torch.no_grad():
            layer.f.inner.bias.add_(0.3)
        layer.f.inner.weight.requires_grad_(False)
    found = [
        torch.autograd.grad(run(layer, *operands(4)).sum(), layer.f.inner.bias) for layer in (fast, eager)
    ]
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14)


def test_second_derivatives_and_transforms_take_the_ordinary_rule(quickly):
    fast, eager = layers_of("root", compile=True), layers_of("root")
    a, b = operands(2)
    assert torch.autograd.gradgradcheck(lambda b: run(fast, a.detach(), b), b)
    jacobians = [torch.func.jacrev(lambda b: run(layer, a, b))(b) for layer in (fast, eager)]  # noqa: B023
    torch.testing.assert_close(*jacobians, rtol=1e-13, atol=1e-14)
    columns = torch.eye(6).reshape(6, 2, 3)
    rows = [
        torch.autograd.grad(run(layer, a, b), b, columns, is_grads_batched=True)[0] for layer in (fast, eager)
    ]
    torch.testing.assert_close(*rows, rtol=1e-13, atol=1e-14)


def test_a_singular_jacobian_is_examined_by_the_ordinary_rule(quickly):
    layer = inv.RootLayer(lambda y, b: (y - b) ** 2, solver=lambda y0, b: b, compile=True)
    b = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(inv.SingularJacobianError, match="singular at the solution"):
        layer(b, y0=b).sum().backward()
    zero = inv.RootLayer(
        layer.f, solver=layer.solver, compile=True, adjoint=inv.adjoints.Implicit(singular="zero")
    )
    assert (torch.autograd.grad(zero(b, y0=b).sum(), b)[0] == 0).all()


def test_mixed_samples_are_found(quickly):
    layer = inv.RootLayer(
        lambda y, b: y - 0.1 * y.mean(0) - b, solver=lambda y0, b: b + b.mean(0) / 9, compile=True
    )
    b = torch.rand(4, 3, requires_grad=True)
    with pytest.raises(inv.ConditionsError, match="mix the samples"):
        layer(b, y0=b).sum().backward()


def test_failed_samples_take_the_ordinary_rule(quickly):
    def half_wrong(y0, a, b):
        y = opaque.opaque_root(y0, a, b)
        y[1] = 5.0
        return y

    fast, eager = (
        inv.RootLayer(opaque.root_conditions, solver=half_wrong, on_failure="zero_grad", compile=flag)
        for flag in (True, False)
    )
    found = [gradients(layer, *operands(3)) for layer in (fast, eager)]
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14)
    assert (found[0][1][1] == 0).all()


# It says so where it does not compile


def untraceable(y: Tensor, b: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y**3 + y - b


def captures(weight: Tensor):
    return lambda y, b: weight * y - b


CANNOT = {
    "Unsupported": lambda weight: (untraceable, {}),
    "capture tensors": lambda weight: (captures(weight), {}),
    "solves by LU": lambda weight: (
        lambda y, b: y**3 + y - b,
        {"adjoint": inv.adjoints.Implicit(linear_solver=inv.linear.GMRES())},
    ),
}


@pytest.mark.parametrize("reason", CANNOT)
def test_it_says_why_it_takes_the_ordinary_rule(reason, quickly):
    weight = torch.full((3,), 2.0, requires_grad=True)
    conditions, keywords = CANNOT[reason](weight)
    fast = inv.RootLayer(conditions, compile=True, **keywords)
    eager = inv.RootLayer(conditions, **keywords)
    b = operands(2)[1]
    with pytest.warns(inv.PerformanceWarning, match=f"compile=True: .*{reason}"):
        (found,) = torch.autograd.grad(fast(b, y0=b).sum(), b)
    torch.testing.assert_close(found, torch.autograd.grad(eager(b, y0=b).sum(), b)[0], rtol=1e-13, atol=1e-14)
    torch.autograd.grad(fast(b, y0=b).sum(), b)  # it says it once


def test_many_unknowns_are_not_compiled(quickly):
    layer = inv.RootLayer(lambda y, b: 2 * y - b, compile=True)
    b = torch.ones(1, 150, requires_grad=True)
    with pytest.warns(inv.PerformanceWarning, match="fewer than 150 unknowns, and this one has 150"):
        layer(b, y0=b).sum().backward()


def test_containers_are_not_compiled(quickly):
    layer = inv.RootLayer(lambda y, q: 2 * y - q["b"], compile=True)
    b = torch.ones(1, 3, requires_grad=True)
    with pytest.warns(inv.PerformanceWarning, match="args are not plain tensors"):
        layer({"b": b}, y0=b).sum().backward()
    assert torch.equal(b.grad, torch.full((1, 3), 0.5))


def test_nothing_is_kept_of_conditions_that_are_gone(quickly):
    layer = inv.RootLayer(Cubic(), compile=True)
    gradients(layer, *operands(2))
    gone = weakref.ref(layer.f)
    before = len(compiled._RULES)
    del layer
    gc.collect()
    assert gone() is None
    assert len(compiled._RULES) < before


@pytest.mark.parametrize("with_gradient", [True, False])
def test_parameters_swapped_by_functional_call(with_gradient, quickly):
    """After the forward the module holds its own parameters again: the compiled rule must not read those."""
    fast, eager = inv.RootLayer(Cubic(), compile=True), inv.RootLayer(Cubic())
    swapped = {
        name: (1.5 * tensor.detach() + 0.1).requires_grad_(with_gradient)
        for name, tensor in fast.named_parameters()
    }
    a, b = operands(2)
    inputs = (a, b, *(swapped.values() if with_gradient else ()))
    gradients(fast, a, b)  # compiled for the module's own parameters
    found, exact = (
        torch.autograd.grad(torch.func.functional_call(layer, swapped, (a, b), {"y0": b}).sum(), inputs)
        for layer in (fast, eager)
    )
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
