"""What fails in eager mode fails in a graph, and what a graph cannot do raises: never a silent zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import invlayer_core as inv
from tests import opaque

pytestmark = pytest.mark.usefixtures("float64")

A = torch.tensor([0.6, 0.7, 0.8], dtype=torch.float64)
B = torch.tensor([[0.5, 0.6, 0.7], [0.9, 0.8, 0.7]], dtype=torch.float64)


def half_wrong(y0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The second sample is not solved at all."""
    y = opaque.opaque_root(y0, a, b)
    y[1] = 5.0
    return y


def layer_with(on_failure: str) -> inv.RootLayer:
    return inv.RootLayer(opaque.root_conditions, solver=half_wrong, on_failure=on_failure)


def call(layer: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return layer(a, b, y0=torch.zeros_like(b)).sin()


@pytest.fixture
def compiled():
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def test_a_failing_sample_raises_the_error_of_eager_mode(compiled):
    layer = layer_with("raise")
    errors = []
    for function in (call, compiled):
        with pytest.raises(inv.ConvergenceError, match="sample 1") as caught:
            function(layer, A, B)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert errors[1].info.ok.tolist() == [True, False]


@pytest.mark.parametrize("on_failure", ["nan", "zero_grad"])
def test_a_failed_sample_has_the_derivative_of_its_policy(compiled, on_failure):
    layer = layer_with(on_failure)
    found = []
    for function in (call, compiled):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        y = function(layer, a, b)
        found.append((y, *torch.autograd.grad(y[:1].sum() + 2 * y[1:].sum(), (a, b))))
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14, equal_nan=True)
    assert found[1][2][1].isnan().all() if on_failure == "nan" else (found[1][2][1] == 0).all()


def test_a_failed_sample_may_warn(compiled):
    with pytest.warns(inv.ConvergenceWarning, match="sample 1"):
        y = compiled(layer_with("warn"), A, B)
    assert torch.equal(y[1], torch.full((3,), 5.0).sin())


def test_a_singular_jacobian_raises_in_backward():
    layer = inv.RootLayer(lambda y, b: (y - b) ** 2, solver=lambda y0, b: b)
    compiled = torch.compile(lambda b: layer(b, y0=b.detach()), fullgraph=True, backend="aot_eager")
    y = compiled(B.clone().requires_grad_())
    with pytest.raises(inv.SingularJacobianError, match="singular at the solution"):
        y.sum().backward()


# What has no place in a graph


def closure(weight: Tensor) -> inv.RootLayer:
    return inv.RootLayer(lambda y, a, b: weight * y + y**3 - a * b)


REASON = "cannot be part of a graph"


def refused(function, *tensors: Tensor) -> None:
    """In one graph it raises with what to do; in two it has the numbers of eager mode."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REASON):
        torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend="aot_eager")
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    values = [run(*leaves) for run in (compiled, function)]
    torch.testing.assert_close(*values, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.sum(), leaves) for y in values), rtol=1e-13, atol=1e-14
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # before the layer, and behind it


def test_captured_tensors_break_the_graph():
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    layer = closure(weight)
    refused(lambda a, b: layer(2 * a, b, y0=torch.zeros_like(b)).sin(), A, B)

    (eager,) = torch.autograd.grad(call(layer, A, B).sum(), weight)
    compiled = torch.compile(lambda b: call(layer, A, 2 * b), backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(B / 2).sum(), weight)
    torch.testing.assert_close(gradient, eager, rtol=1e-13, atol=1e-14)


def test_return_info_breaks_the_graph():
    layer = inv.RootLayer(opaque.root_conditions, return_info=True)
    refused(lambda a, b: layer(2 * a, b, y0=torch.zeros_like(b))[0].sin(), A, B)


def test_a_solver_function_breaks_the_graph_until_it_is_known_what_it_returns():
    @inv.implicit_function(opaque.root_conditions)
    def solve(a, b):
        return opaque.opaque_root(b, a, b)

    refused(lambda a, b: solve(2 * a, b).sin(), A, B)
    solve.register_fake(lambda a, b: torch.empty_like(b))
    torch.compile(lambda a, b: solve(2 * a, b).sin(), fullgraph=True, backend="aot_eager")(A, B)


def test_closures_in_the_graph_break_it():
    refused(lambda a, b: inv.root(lambda y: y + y**3 - a * b, torch.zeros_like(b)).sin(), A, B)


def test_a_false_promise_of_a_shape_raises():
    @inv.implicit_function(opaque.root_conditions)
    def solve(a, b):
        return opaque.opaque_root(b, a, b)

    solve.register_fake(lambda a, b: b.new_empty(b.shape[0], 4))
    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    with pytest.raises(inv.ConditionsError, match=r"returned y of shape \(2, 3\).*traced for shape \(2, 4\)"):
        compiled(A, B)


def test_aux_has_no_place_in_a_graph():
    @inv.implicit_function(opaque.root_conditions)
    def solve(a, b):
        return opaque.opaque_root(b, a, b), {"steps": 3}

    solve.register_fake(lambda a, b: torch.empty_like(b))
    with pytest.raises(inv.ConditionsError, match=r"\(y, aux\) inside torch.compile"):
        torch.compile(solve, fullgraph=True, backend="aot_eager")(A, B)


def test_a_tensor_captured_where_no_one_looked_raises():
    hidden: dict[str, list] = {"set": [torch.ones(3)]}
    layer = inv.RootLayer(lambda y, a, b: hidden["set"][0] * y - a * b)
    hidden["set"][0].requires_grad_()  # after the layer had looked through its conditions
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(inv.ConditionsError, match="neither in args nor a parameter"):
        compiled(layer, A, B)
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer, A, B), call(layer, A, B), rtol=0, atol=0)


# Derivatives that the operators do not have


def operator(b: Tensor) -> Tensor:
    tensors = [torch.zeros_like(b), A, b]
    return torch.ops.invlayer.solve(LAYER.trace_key, "(...,...,)", True, tensors)[0]


LAYER = inv.RootLayer(opaque.root_conditions)

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda b: f(b).sum()),
    "vjp": lambda f: lambda b: torch.func.vjp(f, b)[1](b)[0],
    "jvp": lambda f: lambda b: torch.func.jvp(f, (b,), (b,))[1],
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda b: f(b).sum()),
    "vmap": torch.func.vmap,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_operator_refuses_transforms(name):
    with pytest.raises(inv.UnsupportedTransformError, match=r"torch\.func transform"):
        TRANSFORMS[name](operator)(B)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_a_compiled_function_refuses_transforms_within(name):
    transformed = TRANSFORMS[name](lambda b: call(LAYER, A, b))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.func transform .* met a layer"):
        torch.compile(transformed, fullgraph=True, backend="eager")(B)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_an_exported_program_refuses_transforms(name):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYER

        def forward(self, b):
            return call(self.layer, A, b)

    exported = torch.export.export(Model(), (B,)).module()
    with pytest.raises(inv.UnsupportedTransformError, match=r"torch\.func transform"):
        TRANSFORMS[name](exported)(torch.stack([B, B]) if name == "vmap" else B)


def test_eager_forward_mode_is_refused():
    with forward_ad.dual_level(), pytest.raises(inv.UnsupportedTransformError, match="tangent would be lost"):
        operator(forward_ad.make_dual(B, B))


def test_a_second_derivative_raises():
    b = B.clone().requires_grad_()
    compiled = torch.compile(lambda b: call(LAYER, A, b), fullgraph=True, backend="eager")
    (first,) = torch.autograd.grad(compiled(b).sum(), b, create_graph=True)
    with pytest.raises(inv.UnsupportedTransformError, match="differentiated twice"):
        first.sum().backward()
    torch._dynamo.reset()
    compiled = torch.compile(lambda b: call(LAYER, A, b), fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(b).sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.sum().backward()
