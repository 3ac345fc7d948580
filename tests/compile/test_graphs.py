"""Layers inside ``torch.compile`` and ``torch.export``: the numbers of eager mode, in one graph.

The expected values are those of the eager layer, which has its own oracles elsewhere, and once more of Newton's
method unrolled (``opaque.Case.oracle``).
"""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import weakref


import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from tests import opaque

pytestmark = pytest.mark.usefixtures("float64")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


class Cubic(torch.nn.Module):
    """Conditions with parameters of their own, one of them tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.tied = self.inner.weight

    def forward(self, y: Tensor, a: Tensor) -> Tensor:
        return y + 0.2 * torch.tanh(self.inner(y)) + 0.05 * y @ self.tied - a

    def residual(self, y: Tensor, a: Tensor) -> Tensor:
        return self(y, a)


class Stretched(torch.nn.Module):
    """A map to be inverted, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 1.5, 2.0]))

    def forward(self, y: Tensor) -> Tensor:
        return opaque.forward_map(y) * self.weight


def solve_stretched(map_: Stretched):
    return lambda x: opaque.opaque_inverse(x / map_.weight.detach())


@inv.implicit_function(opaque.root_conditions)
def decorated(a: Tensor, b: Tensor) -> Tensor:
    return opaque.opaque_root(b, a, b)


decorated.register_fake(lambda a, b: torch.empty_like(b))


@inv.implicit_function(lambda y, q: y * q["b"] ** q["power"] - q["c"][0])
def with_containers(q: dict) -> Tensor:
    return q["c"][0] / q["b"] ** q["power"]


with_containers.register_fake(lambda q: torch.empty_like(q["b"]))


@inv.implicit_function(opaque.root_conditions)
def without_fake(a: Tensor, b: Tensor) -> Tensor:
    return opaque.opaque_root(b, a, b)


def zeros(b: Tensor) -> Tensor:
    return torch.zeros_like(b)


class Layers(torch.nn.Module):
    """Every entry that can be part of a graph, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.cubic, self.stretched = Cubic(), Stretched()
        self.root = inv.RootLayer(opaque.root_conditions, solver=opaque.opaque_root)
        self.jacobian = inv.RootLayer(
            opaque.root_conditions, solver=opaque.opaque_root, jacobian=opaque.root_jacobian
        )
        self.module = inv.RootLayer(self.cubic)
        self.method = inv.RootLayer(self.cubic.residual)
        self.fixed_point = inv.FixedPointLayer(opaque.fixed_point_map, solver=opaque.opaque_fixed_point)
        self.inverse = inv.InverseLayer(opaque.opaque_inverse, f=opaque.forward_map)
        self.inverse_jacobian = inv.InverseLayer(opaque.opaque_inverse, jacobian=opaque.forward_jacobian)
        self.inverse_module = inv.InverseLayer(solve_stretched(self.stretched), f=self.stretched)

    def function(self, name: str):
        return {
            "root": lambda a, b: self.root(a, b, y0=zeros(b)),
            "jacobian": lambda a, b: self.jacobian(a, b, y0=zeros(b)),
            "module": lambda a, b: self.module(a * b, y0=zeros(b)),
            "method": lambda a, b: self.method(a * b, y0=zeros(b)),
            "fixed_point": lambda a, b: self.fixed_point(a, b, y0=zeros(b)),
            "inverse": lambda a, b: self.inverse(a * b),
            "inverse_jacobian": lambda a, b: self.inverse_jacobian(a * b),
            "inverse_module": lambda a, b: self.inverse_module(a * b),
            "function root": lambda a, b: inv.root(
                opaque.root_conditions, zeros(b), (a, b), solver=opaque.opaque_root, atol=1e-9
            ),
            "function root of a module": lambda a, b: inv.root(self.cubic, zeros(b), a * b),
            "function root of a lambda": lambda a, b: inv.root(
                lambda y, a, b: y + 0.2 * torch.tanh(y) * a - b, zeros(b), (a, b), options={"maxiter": 30}
            ),
            "function fixed_point": lambda a, b: inv.fixed_point(opaque.fixed_point_map, zeros(b), (a, b)),
            "function inverse": lambda a, b: inv.inverse(a * b, opaque.opaque_inverse, f=opaque.forward_map),
            "implicit_function": lambda a, b: decorated(a, b),
            "containers": lambda a, b: with_containers({"b": b, "c": [a * b], "power": 2}),
        }[name]


NAMES = (
    "root", "jacobian", "module", "method", "fixed_point", "inverse", "inverse_jacobian", "inverse_module",
    "function root", "function root of a module", "function root of a lambda", "function fixed_point",
    "function inverse", "implicit_function", "containers",
)  # fmt: skip


def operands(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(batch) + sum(batch))
    return tuple(0.5 + torch.rand(*shape, generator=generator) for shape in ((3,), (*batch, 3)))


def value_and_gradients(function, layers: torch.nn.Module, *tensors: Tensor) -> list[Tensor | None]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    parameters = list(layers.parameters())
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y.sin() * y).sum(), leaves + parameters, allow_unused=True)]


def agree(compiled, eager, layers: torch.nn.Module, *tensors: Tensor) -> None:
    one = value_and_gradients(compiled, layers, *tensors)
    other = value_and_gradients(eager, layers, *tensors)
    assert [part is None for part in one] == [part is None for part in other]
    for part, expected in zip(one, other, strict=True):
        if part is not None:
            torch.testing.assert_close(part, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_has_the_numbers_of_eager_mode(name):
    layers = Layers()
    function = layers.function(name)
    compiled = torch.compile(lambda a, b: function(a, 2 * b).cos(), fullgraph=True, backend="aot_eager")
    eager = lambda a, b: function(a, 2 * b).cos()  # noqa: E731
    for batch in ((4,), (2,), (7,)):  # the second compiles for any size, the third compiles nothing
        agree(compiled, eager, layers, *operands(*batch))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def test_the_graph_agrees_with_newton_unrolled():
    case = opaque.CASES["root-opaque"]
    layer = inv.RootLayer(opaque.root_conditions, solver=opaque.opaque_root)
    compiled = torch.compile(
        lambda a, b: layer(a, b, y0=opaque.start_like(b)), fullgraph=True, backend="aot_eager"
    )
    tensors = [tensor.requires_grad_() for tensor in case.inputs(3)]
    values = [function(*tensors) for function in (compiled, case.oracle)]
    gradients = [torch.autograd.grad(value.pow(2).sum(), tensors) for value in values]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_a_dimension_declared_dynamic_is_compiled_once():
    layers = Layers()
    compiled = torch.compile(layers.function("module"), fullgraph=True, backend="aot_eager")
    for size in (3, 5, 9):
        a, b = (tensor.requires_grad_() for tensor in operands(size))
        torch._dynamo.mark_dynamic(b, 0)
        b = b.detach()
        torch._dynamo.mark_dynamic(b, 0)
        torch.testing.assert_close(compiled(a, b), layers.function("module")(a, b), rtol=1e-13, atol=1e-14)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["root", "module", "function inverse"])
def test_inductor(name, dynamic):
    layers = Layers()
    compiled = torch.compile(layers.function(name), fullgraph=True, dynamic=dynamic)
    for batch in ((4,), (2,)):
        agree(compiled, layers.function(name), layers, *operands(*batch))


def test_without_gradients_and_in_half_precision():
    layer = inv.RootLayer(opaque.root_conditions)
    compiled = torch.compile(
        lambda a, b: layer(a, b, y0=torch.zeros_like(b)), fullgraph=True, backend="aot_eager"
    )
    a, b = (tensor.half() for tensor in operands(2))
    with torch.no_grad():
        assert compiled(a, b).dtype == torch.float16
        torch.testing.assert_close(compiled(a, b), layer(a, b, y0=torch.zeros_like(b)), rtol=0, atol=0)
    agree(compiled, lambda a, b: layer(a, b, y0=torch.zeros_like(b)), layer, a, b)


# What the graph refers to


def test_each_layer_has_a_graph_of_its_own():
    def call(layer, b):
        return layer(b, y0=torch.ones_like(b))

    layers = [inv.RootLayer(lambda y, b, k=k: y**2 - k * b) for k in (1.0, 4.0)]
    layers.append(copy.deepcopy(layers[1]))
    assert len({layer.trace_key for layer in layers}) == 3
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    b = torch.tensor([4.0])
    found = [compiled(layer, b) for layer in layers]
    torch.testing.assert_close(torch.cat(found), torch.tensor([2.0, 4.0, 4.0]))


def test_a_closure_is_never_answered_by_another():
    def conditions(k: float):
        return lambda y, b: y**2 - k * b

    def call(f, b):
        return inv.root(f, torch.ones_like(b), b)

    compiled = torch.compile(call, backend="eager")
    b = torch.tensor([4.0])
    found = [compiled(conditions(k), b) for k in (1.0, 4.0)]
    torch.testing.assert_close(torch.cat(found), torch.tensor([2.0, 4.0]))


def test_a_pickled_layer_draws_its_own_key():
    layer = inv.RootLayer(opaque.root_conditions)
    again = pickle.loads(pickle.dumps(layer))
    assert again.trace_key not in ("", layer.trace_key)


def test_parameters_may_move_and_be_replaced():
    layers = Layers()
    function = layers.function("module")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = operands(3)
    agree(compiled, function, layers, *tensors)
    with torch.no_grad():
        layers.cubic.inner.bias.add_(0.5)
    agree(compiled, function, layers, *tensors)
    layers.cubic.inner.bias = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))
    agree(compiled, function, layers, *tensors)


def test_functional_call_stands_in_for_the_parameters():
    layer = inv.RootLayer(Cubic())
    weights = {name: 2 * tensor.detach() for name, tensor in layer.named_parameters()}

    def call(weights, b):
        return torch.func.functional_call(layer, weights, (b,), {"y0": torch.zeros_like(b)})

    _, b = operands(2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    y = compiled(leaves, b)
    gradients = torch.autograd.grad(y.sum(), [*leaves.values()])
    layer.load_state_dict(weights, strict=False)
    expected = value_and_sum_gradients(layer, b)
    torch.testing.assert_close((y, *gradients), expected, rtol=1e-13, atol=1e-14)


def value_and_sum_gradients(layer: torch.nn.Module, b: Tensor) -> tuple[Tensor, ...]:
    y = layer(b, y0=torch.zeros_like(b))
    return y, *torch.autograd.grad(y.sum(), [*layer.parameters()])


def test_no_layer_is_kept_alive():
    layer = inv.RootLayer(opaque.root_conditions)
    module = Cubic()
    call = torch.compile(
        lambda layer, module, b: layer(b, b, y0=b) + inv.root(module, b, b), fullgraph=True, backend="eager"
    )
    call(layer, module, operands(2)[1])
    gone = weakref.ref(layer), weakref.ref(module)
    torch._dynamo.reset()
    del layer, module, call
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_graph_says_if_its_layer_is_gone():
    with pytest.raises(inv.UnsupportedTransformError, match="keep the layer alive as long"):
        torch.ops.invlayer.solve("RootLayer-0", "(...,)", True, [torch.ones(2), torch.ones(2)])


# torch.export


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = inv.RootLayer(Cubic())

    def forward(self, b: Tensor) -> Tensor:
        return self.layer(b, y0=torch.zeros_like(b)).sin() + decorated(b.mean(0), b)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_numbers_of_eager_mode(strict):
    model = Model()
    b = operands(4)[1]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (b,), dynamic_shapes=({0: batch},), strict=strict)
    assert "invlayer.solve" in program.graph_module.code
    exported = program.module()
    for size in (4, 6):
        b = operands(size)[1]
        torch.testing.assert_close(exported(b), model(b), rtol=0, atol=0)
        gradients = []
        for function in (exported, model):
            leaf = b.clone().requires_grad_()
            gradients.append(torch.autograd.grad(function(leaf).sum(), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-14)


def test_a_saved_program_runs_in_its_own_process_only(tmp_path):
    model = Model()
    b = operands(4)[1]
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (b,)), path)
    again = torch.export.load(path).module()
    torch.testing.assert_close(again(b), model(b), rtol=0, atol=0)
    del model
    gc.collect()
    with pytest.raises(inv.UnsupportedTransformError, match="does not exist in this process"):
        again(b)


def test_export_refuses_what_has_no_place_in_a_graph():
    weight = torch.ones(3, requires_grad=True)

    class Closure(torch.nn.Module):
        def forward(self, b: Tensor) -> Tensor:
            return inv.root(lambda y, b: weight * y - b, b, b)

    with pytest.raises(inv.UnsupportedTransformError, match="Accepted under torch.compile"):
        torch.export.export(Closure(), (operands(2)[1],), strict=False)


# The operators by themselves


def test_the_operators_pass_the_checks_of_torch():
    layer = inv.RootLayer(Cubic())
    b = operands(2)[1]
    tensors = [torch.zeros_like(b), b.clone().requires_grad_(), *layer.parameters()]
    solve = torch.ops.invlayer.solve.default
    torch.library.opcheck(solve, (layer.trace_key, "(...,)", True, tensors))
    y, dead = solve(layer.trace_key, "(...,)", True, tensors)
    wanted = [tensor.requires_grad for tensor in tensors]
    constants = [tensor.detach() for tensor in tensors]
    rest = (y.detach(), dead, torch.ones_like(y), constants, wanted)
    torch.library.opcheck(torch.ops.invlayer.pullback.default, (layer.trace_key, "(...,)", *rest))
