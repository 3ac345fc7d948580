"""Tensors that f uses without being given them: they get their gradients too, or an error names them.

The oracle is y ← x − m(y)/16 repeated: no linear algebra, no implicit function theorem, only torch's own
record of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
MAX_SWEEPS = 200


class Sequence1d(nn.Module):
    """A module for (batch, time, features) on rows of length time · features."""

    def __init__(self, module: nn.Module, features: int) -> None:
        super().__init__()
        self.module, self.features = module, features

    def forward(self, y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention whose second derivative torch has
            result = self.module(y.reshape(y.shape[0], -1, self.features))
        return (result[0] if isinstance(result, tuple) else result).reshape(y.shape[0], -1)


class Channels(nn.Module):
    """A convolution along each row."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Conv1d(1, 1, kernel_size=3, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        return self.module(y.unsqueeze(1)).squeeze(1).tanh()


class Recurrent(nn.Module):
    """A GRU cell whose hidden state is the unknown, with its input as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)
        self.register_buffer("input", torch.randn(1, 3))

    def forward(self, y: Tensor) -> Tensor:
        return self.cell(self.input.expand(y.shape[0], 3), y)


class Whitened(nn.Module):
    """BatchNorm in eval mode: running statistics are buffers, and samples do not mix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.copy_(torch.randn(4))
        self.norm.running_var.copy_(0.5 + torch.rand(4))
        self.eval()

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(y).tanh()


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(2, nhead=1, dim_feedforward=4, dropout=0.0, batch_first=True)
    return Sequence1d(layer, 2).eval()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()),
    "GRUCell": Recurrent,
    "LSTM": lambda: Sequence1d(nn.LSTM(2, 2, batch_first=True), 2),
    "Conv1d": Channels,
    "TransformerEncoderLayer": attention,
    "BatchNorm-eval": Whitened,
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def samples(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, requires_grad=True)


def by_root(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return inv.root(lambda y, x: y + module(y) / 16 - x, torch.zeros_like(x), args=x)


def by_fixed_point(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return inv.fixed_point(lambda y, x: x - module(y) / 16, torch.zeros_like(x), args=x)


def by_opaque_root(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = by_sweeps(module, x).detach().numpy()
    solver = inv.from_numpy(lambda *_: found)
    return inv.root(lambda y, x: y + module(y) / 16 - x, torch.zeros_like(x), args=x, solver=solver)


def by_sweeps(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The oracle; it goes on for a while after the values have settled, for its derivatives to settle."""
    y, settled = x, 0
    for sweep in range(MAX_SWEEPS):
        previous, y = y, x - module(y) / 16
        settled = settled or (sweep if bool((y - previous).abs().max() < 1e-15) else 0)
        if settled and sweep >= 2 * settled:
            return y
    raise AssertionError("the oracle does not converge")


def both_orders(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """First derivatives of a loss, and the gradient of a nonlinear function of them."""
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    first = torch.autograd.grad((weight * y.sin()).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(slope.sin().sum() for slope in first), inputs)
    return (*(slope.detach() for slope in first), *second)


@pytest.mark.parametrize("solve", [by_root, by_fixed_point, by_opaque_root])
def test_module_parameters_to_second_order(module: nn.Module, solve: Any) -> None:
    x = samples()
    inputs = (x, *module.parameters())
    ours = both_orders(solve(module, x), inputs)
    torch.testing.assert_close(ours, both_orders(by_sweeps(module, x), inputs), **CLOSE)


def test_parameters_reach_an_optimizer(module: nn.Module) -> None:
    x = samples()
    by_root(module, x).pow(2).sum().backward()
    ours = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    by_sweeps(module, x).pow(2).sum().backward()
    torch.testing.assert_close(ours, [parameter.grad for parameter in module.parameters()], **CLOSE)


def test_layer_owns_the_parameters_of_its_module() -> None:
    module = nn.Linear(4, 4)
    layer = inv.RootLayer(module)
    assert set(map(id, layer.parameters())) == set(map(id, module.parameters()))
    layer(y0=torch.zeros(1, 4)).sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in layer.parameters())


class Model:
    """Not a module: its tensors are plain attributes."""

    def __init__(self) -> None:
        self.scale = torch.tensor([0.5, 1.5], requires_grad=True)
        self.items = [torch.tensor(0.3, requires_grad=True), {"shift": torch.tensor(0.1, requires_grad=True)}]

    def conditions(self, y: Tensor) -> Tensor:
        return self.scale * y**3 + y - self.items[0] - self.items[1]["shift"]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.scale, self.items[0], self.items[1]["shift"]


def solved_by_hand(scale: Tensor, right: Tensor) -> Tensor:
    """scale·y³ + y = right, by Newton's method unrolled."""
    y = torch.zeros(2)
    for _ in range(20):
        y = y - (scale * y**3 + y - right) / (3 * scale * y**2 + 1)
    return y


def test_bound_method() -> None:
    model = Model()
    ours = both_orders(inv.root(model.conditions, torch.zeros(2)), model.tensors())
    scale, one, two = model.tensors()
    torch.testing.assert_close(ours, both_orders(solved_by_hand(scale, one + two), model.tensors()), **CLOSE)


def test_list_of_tensors_and_non_leaves() -> None:
    """What is captured may itself be computed; the gradient flows on to what it was computed from."""
    leaf = torch.tensor([0.4, 0.9], requires_grad=True)
    parts = [leaf.exp(), leaf * leaf.flip(0)]
    ours = both_orders(
        inv.root(lambda y: torch.stack([parts[0] * y**3 + y, -parts[1]]).sum(0), torch.zeros(2)), [leaf]
    )
    oracle = both_orders(solved_by_hand(leaf.exp(), leaf * leaf.flip(0)), [leaf])
    torch.testing.assert_close(ours, oracle, **CLOSE)


def test_captured_tensor_that_is_an_argument_too() -> None:
    a = torch.tensor([0.4, 0.9], requires_grad=True)
    ours = both_orders(inv.root(lambda y, b: a * y**3 + y - b, torch.zeros(2), args=a), [a])
    torch.testing.assert_close(ours, both_orders(solved_by_hand(a, a), [a]), **CLOSE)


def test_inverse_captures() -> None:
    scale, x = torch.tensor(0.7, requires_grad=True), torch.tensor([[0.3, 0.8]], requires_grad=True)
    y = inv.inverse(x, lambda x: solved_by_hand(scale, x), f=lambda y: scale * y**3 + y)
    torch.testing.assert_close(
        both_orders(y, [scale, x]), both_orders(solved_by_hand(scale, x), [scale, x]), **CLOSE
    )


def test_implicit_function_captures() -> None:
    scale, x = torch.tensor(0.7, requires_grad=True), torch.tensor([[0.3, 0.8]], requires_grad=True)

    @inv.implicit_function(conditions=lambda y, x: scale * y**3 + y - x)
    def solve(x: Tensor) -> Tensor:
        return solved_by_hand(scale.detach(), x)

    torch.testing.assert_close(
        both_orders(solve(x), [scale, x]), both_orders(solved_by_hand(scale, x), [scale, x]), **CLOSE
    )


# --- f with derivatives inside --------------------------------------------------------------------------


def energy(y: Tensor, stiffness: Tensor) -> Tensor:
    """One energy per sample."""
    return (stiffness * y.pow(4) / 4 + y.pow(2) / 2 + 0.1 * y.prod(-1, keepdim=True)).sum(-1)


def force_by_hand(y: Tensor, stiffness: Tensor) -> Tensor:
    return stiffness * y**3 + y + 0.1 * y.shape[-1] * y.flip(-1)


def force_by_autograd(y: Tensor, stiffness: Tensor) -> Tensor:
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        return torch.autograd.grad(energy(y, stiffness).sum(), y, create_graph=True)[0]


def force_by_func(y: Tensor, stiffness: Tensor) -> Tensor:
    return grad(lambda y: energy(y, stiffness).sum())(y)


def force_by_vmap(y: Tensor, stiffness: Tensor) -> Tensor:
    return vmap(grad(lambda y: energy(y, stiffness)))(y)


@pytest.mark.parametrize("force", [force_by_autograd, force_by_func, force_by_vmap])
def test_f_takes_a_gradient_itself(force: Callable[[Tensor, Tensor], Tensor]) -> None:
    stiffness = torch.tensor([0.5, 1.5], requires_grad=True)
    load = torch.tensor([[0.3, 0.8], [1.0, -0.5], [0.2, 0.1]], requires_grad=True)

    def solve(force: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return inv.root(lambda y, load: force(y, stiffness) - load, torch.zeros_like(load), args=load)

    def sweeps() -> Tensor:
        y = torch.zeros(3, 2)
        for _ in range(60):
            residual = force_by_hand(y, stiffness) - load
            blocks = torch.diag_embed(3 * stiffness * y**2 + 1) + 0.2 * torch.tensor([[0, 1.0], [1.0, 0]])
            y = y - torch.linalg.solve(blocks, residual.unsqueeze(-1)).squeeze(-1)
        return y

    ours = both_orders(solve(force), [stiffness, load])
    torch.testing.assert_close(ours, both_orders(sweeps(), [stiffness, load]), **CLOSE)


class Product(torch.autograd.Function):
    """x·w by a Function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return cotangent * w, cotangent * x


def test_own_function_of_a_captured_expression() -> None:
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    inv.root(lambda y: Product.apply(y, w * 1) - 1, torch.ones(2)).sum().backward()
    torch.testing.assert_close(w.grad, -1 / w.detach() ** 2)


def test_own_function_of_a_captured_leaf_is_refused() -> None:
    """``Function.apply`` hides its inputs from every torch mode; an error is the least there has to be."""
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    with pytest.raises(inv.ConditionsError, match=r"a tensor of shape \(2,\), which requires grad"):
        inv.root(lambda y: Product.apply(y, w) - 1, torch.ones(2))


class TwiceProduct(Product):
    """The same, with a Function in its backward, as layers within layers have."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return Product.apply(cotangent, w), Product.apply(cotangent, x)


def test_own_function_whose_backward_is_a_function() -> None:
    def both(square: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        a = torch.tensor([0.4, 0.9, 0.6], requires_grad=True)
        y = inv.root(lambda y, a: y * square(y) + y - a * a.flip(0), torch.zeros(3), args=a)
        return both_orders(y, [a])

    torch.testing.assert_close(both(lambda y: TwiceProduct.apply(y, y)), both(lambda y: y * y), **CLOSE)


# --- what cannot be found is named ----------------------------------------------------------------------

JIT_WARNS = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.\w+. is deprecated:DeprecationWarning")


@JIT_WARNS
@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_jit_module_is_refused_by_name(how: str) -> None:
    module = nn.Linear(2, 2)
    hidden = torch.jit.script(module) if how == "scripted" else torch.jit.trace(module, torch.zeros(1, 2))
    with pytest.raises(
        inv.ConditionsError, match=r"parameter 'weight' of .*Module.* out of invlayer's reach"
    ):
        inv.RootLayer(hidden)(y0=torch.zeros(1, 2))


@JIT_WARNS
@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_jit_module_in_a_closure_is_refused(how: str) -> None:
    module = nn.Linear(2, 2)
    hidden = torch.jit.script(module) if how == "scripted" else torch.jit.trace(module, torch.zeros(1, 2))
    x = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(inv.ConditionsError, match=r"a tensor of shape .* its gradient would be lost"):
        inv.root(lambda y, x: y + hidden(y) / 8 - x, torch.zeros(1, 2), args=x)


@JIT_WARNS
def test_frozen_jit_module_is_welcome() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    hidden, x = torch.jit.script(module), torch.ones(1, 2, requires_grad=True)
    ours = inv.root(lambda y, x: y + hidden(y) / 8 - x, torch.zeros(1, 2), args=x)
    expected = torch.linalg.inv(torch.eye(2) + module.weight / 8).sum(0, keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x)[0], expected)


@JIT_WARNS
def test_jit_module_is_welcome_without_gradients() -> None:
    hidden = torch.jit.script(nn.Linear(2, 2))
    with torch.no_grad():
        y = inv.root(lambda y: y + hidden(y) / 8 - 1, torch.zeros(1, 2))
    assert not y.requires_grad


# --- cost -----------------------------------------------------------------------------------------------


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize(
    "frozen", [None, torch.tensor([0.5, 1.5], dtype=torch.float64)], ids=["none", "frozen"]
)
def test_one_evaluation_after_the_solve_if_nothing_is_captured(frozen: Tensor | None) -> None:
    b = torch.tensor([[0.3, 0.8]], requires_grad=True)
    scale = torch.ones(2) if frozen is None else frozen
    conditions = Counted(lambda y, b: scale * y**3 + y - b)
    solution = solved_by_hand(scale, b.detach())
    y = inv.root(conditions, torch.zeros(1, 2), args=b, solver=lambda y0, b: solution)
    assert conditions.calls == 1
    y.sum().backward()
    assert conditions.calls == 2


def test_captured_without_requires_grad_gets_nothing() -> None:
    scale = torch.ones(2)
    b = torch.tensor([0.3, 0.8], requires_grad=True)
    inv.root(lambda y, b: scale * y**3 + y - b, torch.zeros(2), args=b).sum().backward()
    assert scale.grad is None


def test_nothing_is_captured_without_grad_mode() -> None:
    scale = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        y = inv.root(lambda y: scale * y**3 + y - 1, torch.zeros(2))
    assert not y.requires_grad


# --- captured under transforms --------------------------------------------------------------------------


def explicit(w: Tensor, a: Tensor) -> Tensor:
    return inv.root(lambda y, w, a: w * y**3 + y - a, torch.zeros_like(a).detach(), args=(w, a))


def capturing_one(w: Tensor, a: Tensor) -> Tensor:
    return inv.root(lambda y, a: w * y**3 + y - a, torch.zeros_like(a).detach(), args=a)


def capturing_all(w: Tensor, a: Tensor) -> Tensor:
    return inv.root(lambda y: w * y**3 + y - a, torch.zeros(2))


W, A = (
    torch.tensor([0.5, 1.5], dtype=torch.float64),
    torch.tensor([[0.3, 0.8], [1.0, 0.4], [0.7, 0.2]], dtype=torch.float64),
)

TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad-w": lambda f: grad(lambda w: f(w, A[0]).sum())(W),
    "grad-a": lambda f: grad(lambda a: f(W, a).sum())(A[0]),
    "jacrev": lambda f: jacrev(f, (0, 1))(W, A[0]),
    "jacfwd": lambda f: jacfwd(f, (0, 1))(W, A[0]),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1))(W, A[0]),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f, (0, 1)), (0, 1))(W, A[0]),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f, (0, 1)), (0, 1))(W, A[0]),
    "vmap-a": lambda f: vmap(lambda a: f(W, a))(A),
    "vmap-w": lambda f: vmap(lambda w: f(w, A[0]))(A),
    "vmap-both": lambda f: vmap(f)(A, A),
    "vmap(grad-w)": lambda f: vmap(grad(lambda w, a: f(w, a).sum()), (None, 0))(W, A),
    "grad-w(vmap-a)": lambda f: grad(lambda w: vmap(lambda a: f(w, a).sum())(A).sum())(W),
    "vmap(vmap)": lambda f: vmap(lambda w: vmap(lambda a: f(w, a))(A))(A),
}


@pytest.mark.parametrize("capturing", [capturing_one, capturing_all])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_captured_under_transforms(transform: Any, capturing: Any) -> None:
    """The same numbers as with every tensor handed over, which test_transforms.py holds against oracles."""
    torch.testing.assert_close(transform(capturing), transform(explicit), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("capturing", [capturing_one, capturing_all])
def test_captured_dual_tensor_in_forward_mode(capturing: Any) -> None:
    def tangent(function: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            w = forward_ad.make_dual(W, torch.tensor([1.0, -2.0]))
            return forward_ad.unpack_dual(function(w, A[0])).tangent

    torch.testing.assert_close(tangent(capturing), tangent(explicit), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("capturing", [capturing_one, capturing_all])
def test_backward_to_captured_through_vmap(capturing: Any) -> None:
    """A module's parameters in a per-sample layer: mapped samples, one shared parameter, eager backward."""

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        w = W.clone().requires_grad_()
        return torch.autograd.grad(vmap(lambda a: function(w, a))(A).pow(2).sum(), w)[0]

    torch.testing.assert_close(gradient(capturing), gradient(explicit), rtol=1e-12, atol=1e-14)


def test_backward_to_captured_through_func_grad() -> None:
    def gradient(function: Callable[..., Tensor]) -> Tensor:
        w = W.clone().requires_grad_()
        inner = grad(lambda a: function(w, a).pow(2).sum())(A[0])
        return torch.autograd.grad(inner.sin().sum(), w)[0]

    torch.testing.assert_close(gradient(capturing_one), gradient(explicit), rtol=1e-12, atol=1e-14)


def test_ensemble_by_functional_call() -> None:
    """One gradient per member of an ensemble: parameters mapped by vmap and captured by f."""
    module, x = nn.Linear(2, 2), torch.rand(2)
    stacked = {
        name: torch.stack([parameter.detach() * scale for scale in (1.0, 1.2, 0.8)])
        for name, parameter in module.named_parameters()
    }

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        tanh = lambda y: functional_call(module, parameters, (y,)).tanh()  # noqa: E731
        return inv.root(lambda y: y + tanh(y) / 8 - x, torch.zeros(2)).pow(2).sum()

    def loss_by_sweeps(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y = x
        for _ in range(60):
            y = x - functional_call(module, parameters, (y,)).tanh() / 8
        return y.pow(2).sum()

    ours = vmap(grad(loss), (0, None))(stacked, x)
    torch.testing.assert_close(ours, vmap(grad(loss_by_sweeps), (0, None))(stacked, x), **CLOSE)


def test_tangents_of_captured_tensors_cross_no_grad():
    w, a = torch.tensor([0.5, 2.0]), torch.ones(2)
    with torch.no_grad(), forward_ad.dual_level():
        moving = forward_ad.make_dual(w, torch.ones(2))
        y = inv.root(lambda y, a: y - moving * a, torch.zeros(2), args=a)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, a)
