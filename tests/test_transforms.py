"""Every derivative that torch offers, of every problem kind, against two oracles.

Finite differences (gradcheck) know nothing of the implicit function theorem; Newton's method unrolled gives
every order to rounding, by brute force.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.opaque import CASES, SIZE, Case, gauss_jordan
from torch import Tensor
from torch.autograd import forward_ad, functional, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def with_grad(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.shared)))


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, **TIGHT)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss with a Hessian of its own."""
    return lambda *args: function(*args).pow(2).sum() + function(*args).prod()


@functools.cache
def oracle_derivatives(
    oracle: Callable[..., Tensor], shared: tuple[bool, ...], batch: tuple[int, ...], order: int
) -> Any:
    """By reverse mode alone; kept, as several layers and transforms are held against them."""
    function: Any = oracle
    for _ in range(order):
        function = jacrev(function, argnums=tuple(range(len(shared))))
    return function(*Case(oracle, oracle, shared).inputs(*batch))


# --- finite differences ---------------------------------------------------------------------------------


def test_gradcheck(case: Case) -> None:
    inputs = with_grad(case.inputs(3))
    assert gradcheck(case.layer, inputs, check_forward_ad=True, check_batched_grad=True)


def test_gradcheck_of_one_system(case: Case) -> None:
    inputs = with_grad(case.inputs())
    assert gradcheck(case.layer, inputs, check_forward_ad=True, check_batched_grad=True)


def test_gradcheck_batched_forward_mode(case: Case) -> None:
    inputs = with_grad(case.inputs(2))
    assert gradcheck(case.layer, inputs, check_forward_ad=True, check_batched_forward_grad=True)


def test_gradgradcheck_reverse_over_reverse(case: Case) -> None:
    assert gradgradcheck(case.layer, with_grad(case.inputs(2)))


def test_gradgradcheck_forward_over_reverse(case: Case) -> None:
    inputs = with_grad(case.inputs(2))
    assert gradgradcheck(
        case.layer, inputs, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


def test_gradgradcheck_batched(case: Case) -> None:
    assert gradgradcheck(case.layer, with_grad(case.inputs(2)), check_batched_grad=True)


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_at_a_forward_level_carries_a_tangent(case: Case, create_graph: bool) -> None:
    """Hessian-vector products by eager forward-over-reverse, which need no create_graph."""
    inputs, direction = with_grad(case.inputs(2)), [torch.randn_like(tensor) for tensor in case.inputs(2)]

    def product(function: Callable[..., Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, direction, strict=True)]
            slopes = torch.autograd.grad(scalar(function)(*duals), duals, create_graph=create_graph)
            return [forward_ad.unpack_dual(slope).tangent for slope in slopes]

    assert_same(product(case.layer), product(case.oracle))


# --- torch.func against the unrolled solver -------------------------------------------------------------

FIRST = {"jacrev": jacrev, "jacfwd": jacfwd}
SECOND = {f"{outer}({inner})": (FIRST[outer], FIRST[inner]) for outer in FIRST for inner in FIRST}


@pytest.mark.parametrize("transform", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_first_order(case: Case, transform: Any, batch: tuple[int, ...]) -> None:
    inputs = case.inputs(*batch)
    ours = transform(case.layer, argnums=every(case))(*inputs)
    assert_same(ours, oracle_derivatives(case.oracle, case.shared, batch, order=1))


@pytest.mark.parametrize(("outer", "inner"), SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_second_order(case: Case, outer: Any, inner: Any, batch: tuple[int, ...]) -> None:
    inputs, argnums = case.inputs(*batch), every(case)
    second = outer(inner(case.layer, argnums=argnums), argnums=argnums)
    if case is CASES["inverse-jacobian"] and outer is inner is jacfwd:
        with pytest.raises(inv.UnsupportedTransformError, match="nested forward mode"):
            second(*inputs)
        return
    assert_same(second(*inputs), oracle_derivatives(case.oracle, case.shared, batch, order=2))


def test_hessian(case: Case) -> None:
    inputs, argnums = case.inputs(2), every(case)
    ours = hessian(scalar(case.layer), argnums=argnums)(*inputs)
    assert_same(ours, hessian(scalar(case.oracle), argnums=argnums)(*inputs))


def test_grad(case: Case) -> None:
    inputs, argnums = case.inputs(3), every(case)
    assert_same(grad(scalar(case.layer), argnums)(*inputs), grad(scalar(case.oracle), argnums)(*inputs))


def test_grad_of_grad(case: Case) -> None:
    inputs = case.inputs(3)

    def second(function: Callable[..., Tensor]) -> Tensor:
        last = len(inputs) - 1
        slope = grad(scalar(function), argnums=last)
        return grad(lambda *args: slope(*args).sin().sum(), argnums=last)(*inputs)

    assert_same(second(case.layer), second(case.oracle))


def test_vjp_and_jvp(case: Case) -> None:
    inputs = case.inputs(3)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    cotangent = torch.randn(3, SIZE)
    assert_same(vjp(case.layer, *inputs)[1](cotangent), vjp(case.oracle, *inputs)[1](cotangent))
    assert_same(jvp(case.layer, inputs, tangents), jvp(case.oracle, inputs, tangents))


# --- third order ----------------------------------------------------------------------------------------


def cube_plus(a: Tensor) -> Tensor:
    """y³ + y = a."""
    return inv.root(lambda y, a: y**3 + y - a, torch.ones_like(a).detach(), args=a)


def third_derivative(a: Tensor) -> Tensor:
    """By hand: y′ = 1/(3y² + 1), y″ = −6y y′³, y‴ = −6y′⁴ + 108y²y′⁵."""
    y = cube_plus(a).detach()
    slope = 1 / (3 * y**2 + 1)
    return -6 * slope**4 + 108 * y**2 * slope**5


THIRD = {
    "".join(name[3] for name in names): [FIRST[name] for name in names]
    for names in [(i, j, k) for i in FIRST for j in FIRST for k in FIRST]
}


@pytest.mark.parametrize("transforms", THIRD.values(), ids=THIRD)
def test_third_order(transforms: list[Any]) -> None:
    a = torch.tensor([0.7, 2.5])
    function: Any = cube_plus
    for transform in transforms:
        function = transform(function)
    expected = torch.zeros(2, 2, 2, 2)
    for i in range(2):
        expected[i, i, i, i] = third_derivative(a)[i]
    assert_same(function(a), expected)


def test_third_order_by_backward() -> None:
    a = torch.tensor([0.7, 2.5], requires_grad=True)
    derivative = cube_plus(a)
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), a, create_graph=True)
    assert_same(derivative.detach(), third_derivative(a.detach()))


def test_fourth_order_agrees_with_the_third_by_differences() -> None:
    a, h = torch.tensor([0.7]), 1e-4
    function: Any = lambda a: cube_plus(a).sum()  # noqa: E731
    for _ in range(4):
        function = (lambda inner: lambda a: grad(lambda a: inner(a).sum())(a))(function)
    difference = (third_derivative(a + h) - third_derivative(a - h)) / (2 * h)
    torch.testing.assert_close(function(a), difference, rtol=1e-6, atol=0)


# --- vmap -----------------------------------------------------------------------------------------------


def mapped_dims(case: Case) -> tuple[int | None, ...]:
    return tuple(None if shared else 0 for shared in case.shared)


def test_vmap_agrees_with_a_batch(case: Case) -> None:
    inputs = case.inputs(4)
    assert_same(vmap(case.layer, mapped_dims(case))(*inputs), case.layer(*inputs))


def test_vmap_over_every_arg(case: Case) -> None:
    inputs = tuple(0.5 + torch.rand(4, SIZE) for _ in case.shared)
    assert_same(vmap(case.layer)(*inputs), case.layer(*inputs))


@pytest.mark.parametrize("out_dim", [0, 1])
def test_vmap_over_a_trailing_dim(case: Case, out_dim: int) -> None:
    inputs = tuple(0.5 + torch.rand(SIZE, 4) for _ in case.shared)
    ours = vmap(case.layer, in_dims=1, out_dims=out_dim)(*inputs)
    expected = case.layer(*(tensor.mT for tensor in inputs))
    assert_same(ours, expected if out_dim == 0 else expected.mT)


def test_vmap_over_batches(case: Case) -> None:
    inputs = tuple(0.5 + torch.rand(*(() if shared else (3, 4)), SIZE) for shared in case.shared)
    assert_same(vmap(case.layer, mapped_dims(case))(*inputs), case.layer(*inputs))


def test_nested_vmap(case: Case) -> None:
    inputs = tuple(0.5 + torch.rand(*(() if shared else (3, 4)), SIZE) for shared in case.shared)
    dims = mapped_dims(case)
    assert_same(vmap(vmap(case.layer, dims), dims)(*inputs), case.layer(*inputs))


def test_vmap_over_different_args_at_each_level() -> None:
    case = CASES["root-native"]
    a, b = 0.5 + torch.rand(3, SIZE), 0.5 + torch.rand(4, SIZE)
    table = vmap(lambda a: vmap(lambda b: case.layer(a, b))(b))(a)
    assert_same(table, case.layer(a[:, None].expand(3, 4, SIZE), b.expand(3, 4, SIZE)))


def test_vmap_of_grad(case: Case) -> None:
    inputs = case.inputs(4)
    per_sample = lambda f: vmap(grad(scalar(f), every(case)), mapped_dims(case))(*inputs)  # noqa: E731
    assert_same(per_sample(case.layer), per_sample(case.oracle))


def test_grad_of_vmap(case: Case) -> None:
    inputs = case.inputs(4)

    def total(function: Callable[..., Tensor]) -> Any:
        summed = lambda *args: vmap(scalar(function), mapped_dims(case))(*args).sum()  # noqa: E731
        return grad(summed, every(case))(*inputs)

    assert_same(total(case.layer), total(case.oracle))


@pytest.mark.parametrize("transform", [*FIRST.values(), hessian], ids=[*FIRST, "hessian"])
def test_vmap_of_jacobians(case: Case, transform: Any) -> None:
    inputs = case.inputs(3)
    per_sample = lambda f: vmap(transform(f, every(case)), mapped_dims(case))(*inputs)  # noqa: E731
    assert_same(per_sample(case.layer), per_sample(case.oracle))


def test_jacobian_of_vmap(case: Case) -> None:
    inputs = case.inputs(3)
    whole = lambda f: jacrev(vmap(f, mapped_dims(case)), every(case))(*inputs)  # noqa: E731
    assert_same(whole(case.layer), whole(case.oracle))


def test_vmap_of_vmapped_gradients(case: Case) -> None:
    inputs = tuple(0.5 + torch.rand(*(() if shared else (2, 3)), SIZE) for shared in case.shared)
    dims = mapped_dims(case)
    nested = lambda f: vmap(vmap(grad(scalar(f), every(case)), dims), dims)(*inputs)  # noqa: E731
    assert_same(nested(case.layer), nested(case.oracle))


def test_eager_backward_through_func_grad() -> None:
    """The inner gradient by torch.func, the outer one by backward, as meta-learning does it."""
    case = CASES["root-native"]

    def outer(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        a, b = with_grad(case.inputs(3))
        inner = grad(scalar(function), argnums=1)(a, b)
        return torch.autograd.grad(inner.sin().sum(), (a, b))

    assert_same(outer(case.layer), outer(case.oracle))


def test_batched_cotangents_through_vmap() -> None:
    case = CASES["root-native"]

    def rows(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = with_grad(case.inputs(2))
        y = vmap(function, (None, 0))(*inputs)
        return torch.autograd.grad(y, inputs, torch.eye(6).reshape(6, 2, 3), is_grads_batched=True)

    assert_same(rows(case.layer), rows(case.oracle))


def test_eager_backward_through_vmap() -> None:
    case = CASES["root-native"]

    def outer(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        a, b = with_grad(case.inputs(3))
        return torch.autograd.grad(vmap(scalar(function), (None, 0))(a, b).sum(), (a, b))

    assert_same(outer(case.layer), outer(case.oracle))


# --- torch.autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "vectorize"), [("reverse-mode", False), ("reverse-mode", True), ("forward-mode", True)]
)
def test_autograd_functional_jacobian(case: Case, vectorize: bool, strategy: str) -> None:
    inputs = case.inputs(3)
    ours = functional.jacobian(case.layer, inputs, vectorize=vectorize, strategy=strategy)
    assert_same(ours, functional.jacobian(case.oracle, inputs))


def test_second_derivative_through_a_vectorized_jacobian(case: Case) -> None:
    def second(function: Callable[..., Tensor], vectorize: bool) -> tuple[Tensor, ...]:
        inputs = with_grad(case.inputs(2))
        rows = functional.jacobian(function, inputs, vectorize=vectorize, create_graph=True)
        loss = sum((row.sin() * torch.arange(row.numel()).reshape(row.shape)).sum() for row in rows)
        return torch.autograd.grad(loss, inputs)

    assert_same(second(case.layer, True), second(case.oracle, False))


def test_functional_hessian(case: Case) -> None:
    inputs = case.inputs(2)
    ours = functional.hessian(scalar(case.layer), inputs)
    assert_same(ours, functional.hessian(scalar(case.oracle), inputs))


def test_retain_graph_gives_the_same_gradient_again(case: Case) -> None:
    inputs = with_grad(case.inputs(3))
    y = case.layer(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), inputs)


def test_hooks_see_and_change_the_gradient(case: Case) -> None:
    inputs, seen = with_grad(case.inputs(3)), []
    y = case.layer(*inputs)
    y.register_hook(lambda cotangent: seen.append(cotangent.clone()) or 2 * cotangent)
    inputs[-1].register_hook(lambda gradient: seen.append(gradient.clone()))
    y.sum().backward()
    (expected,) = torch.autograd.grad(case.layer(*inputs).sum(), inputs[-1:])
    assert torch.equal(seen[0], torch.ones(3, SIZE))
    assert_same(inputs[-1].grad, 2 * expected)
    assert_same(seen[1], 2 * expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case: Case, reentrant: bool) -> None:
    inputs = with_grad(case.inputs(3))
    y = checkpoint(case.layer, *inputs, use_reentrant=reentrant)
    ours = torch.autograd.grad(y.pow(2).sum(), inputs) if not reentrant else _by_backward(y, inputs)
    assert_same(ours, torch.autograd.grad(case.oracle(*inputs).pow(2).sum(), inputs))


def _by_backward(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y.pow(2).sum().backward()
    return tuple(tensor.grad for tensor in inputs)


def test_checkpoint_to_second_order() -> None:
    case = CASES["root-native"]

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = with_grad(case.inputs(3))
        slopes = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), inputs)

    recomputed = second(lambda *args: checkpoint(case.layer, *args, use_reentrant=False))
    assert_same(recomputed, second(case.oracle))


def test_saved_tensors_may_be_packed_away() -> None:
    case = CASES["root-native"]
    inputs = with_grad(case.inputs(3))
    with torch.autograd.graph.save_on_cpu():
        y = case.layer(*inputs)
    assert_same(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(case.oracle(*inputs).sum(), inputs))


@pytest.mark.parametrize("changed", ["arg", "y"])
def test_tensor_changed_in_place_before_backward_raises(changed: str) -> None:
    a = torch.tensor([0.7, 2.5], requires_grad=True)
    y = cube_plus(a)
    with torch.no_grad():
        (a if changed == "arg" else y).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_what_is_asked_for_gets_a_gradient(case: Case) -> None:
    inputs = case.inputs(3)
    last = inputs[-1].clone().requires_grad_()
    case.layer(*inputs[:-1], last).sum().backward()
    assert all(tensor.grad is None for tensor in inputs[:-1])
    (expected,) = torch.autograd.grad(case.oracle(*inputs[:-1], last).sum(), last)
    assert_same(last.grad, expected)


def test_complex_args_of_a_real_system() -> None:
    """dy for dz: torch's gradient of a real loss with respect to z is ∂/∂Re z + i ∂/∂Im z."""
    z = torch.tensor([1.0 + 2.0j, 2.0 - 1.0j, 0.5j], requires_grad=True)

    def layer(z: Tensor) -> Tensor:
        return inv.root(lambda y, z: y**3 + y - (z * z).real - z.imag, torch.ones(3), args=z)

    assert gradcheck(layer, z, check_forward_ad=True)
    assert gradgradcheck(layer, z)


def test_complex_args_in_torch_func() -> None:
    z, tangent = torch.tensor([1.0 + 2.0j, 2.0 - 1.0j, 0.5j]), torch.tensor([1.0 + 1.0j, 2.0j, 1.0])
    b = torch.ones(3)

    def layer(z: Tensor, b: Tensor) -> Tensor:
        return inv.root(lambda y, z, b: y**3 + b * y - (z * z).real - z.imag, torch.ones(3), args=(z, b))

    y, moved = jvp(layer, (z, b), (tangent, torch.zeros(3)))
    expected = (2 * (z * tangent).real + tangent.imag) / (3 * y**2 + 1)
    assert_same(moved, expected)


# --- layers within layers -------------------------------------------------------------------------------


def nested_input() -> Tensor:
    return torch.tensor([[2.0, 3.0, 1.5], [1.0, 4.0, 0.5]])


def inner_conditions(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return z**3 + z - w * y


def inner_oracle(w: Tensor, y: Tensor) -> Tensor:
    z = torch.ones_like(y)
    for _ in range(12):
        z = z - inner_conditions(z, w, y) / (3 * z**2 + 1)
    return z


def outer_oracle(w: Tensor) -> Tensor:
    """z(w, y)_i + y_i + y_{i-1}/5 = 1, with z³ + z = w y."""
    y = torch.ones_like(w)
    for _ in range(12):
        z = inner_oracle(w, y)
        blocks = torch.diag_embed(w / (3 * z**2 + 1) + 1) + 0.2 * torch.eye(SIZE).roll(1, 0)
        y = y - gauss_jordan(blocks, z + y + 0.2 * y.roll(1, -1) - 1)
    return y


def outer_layer(w: Tensor) -> Tensor:
    def conditions(y: Tensor, w: Tensor) -> Tensor:
        z = inv.root(inner_conditions, torch.ones(SIZE).expand(y.shape), args=(w, y))
        return z + y + 0.2 * y.roll(1, -1) - 1

    return inv.root(conditions, torch.ones(SIZE).expand(w.shape), args=w)


def outer_layer_capturing(w: Tensor) -> Tensor:
    def conditions(y: Tensor) -> Tensor:
        z = inv.root(lambda z: inner_conditions(z, w, y), torch.ones(SIZE).expand(y.shape))
        return z + y + 0.2 * y.roll(1, -1) - 1

    return inv.root(conditions, torch.ones(SIZE).expand(w.shape))


NESTED = pytest.mark.parametrize("layer", [outer_layer, outer_layer_capturing], ids=["args", "captured"])


@NESTED
def test_nested_layers_by_backward(layer: Callable[[Tensor], Tensor]) -> None:
    w = nested_input().requires_grad_()
    ours = torch.autograd.grad(layer(w).sum(), w)
    assert_same(ours, torch.autograd.grad(outer_oracle(w).sum(), w))


@NESTED
def test_nested_layers_by_double_backward(layer: Callable[[Tensor], Tensor]) -> None:
    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        w = nested_input().requires_grad_()
        (slope,) = torch.autograd.grad(function(w).sum(), w, create_graph=True)
        return torch.autograd.grad(slope.sin().sum(), w)[0]

    assert_same(second(layer), second(outer_oracle))


@NESTED
@pytest.mark.parametrize(
    "transform",
    [
        jacrev,
        jacfwd,
        lambda f: jacfwd(jacrev(f)),
        lambda f: vmap(grad(lambda w: f(w).sum())),
    ],
    ids=["jacrev", "jacfwd", "jacfwd(jacrev)", "vmap(grad)"],
)
def test_nested_layers_in_torch_func(layer: Callable[[Tensor], Tensor], transform: Any) -> None:
    w = nested_input()
    assert_same(transform(layer)(w), transform(outer_oracle)(w))
