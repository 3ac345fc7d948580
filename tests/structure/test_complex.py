"""Complex unknowns and args: derivatives in torch's convention, for holomorphic conditions and for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.structure.problems import LINES, loads, mismatch, opaque_voltages, unrolled_voltages
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import invlayer_core as inv

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
ONES = torch.ones(2, 2, dtype=torch.complex128)


def flow(solver: Any = "torch.newton", **keywords: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``(loads, lines) -> voltages``, all complex."""
    if solver == "implicit_function":
        return inv.implicit_function(mismatch, **keywords)(inv.from_numpy(opaque_voltages))
    chosen = inv.from_numpy(lambda _v, s, lines: opaque_voltages(s, lines)) if solver == "opaque" else solver
    if solver == "scipy.fsolve":
        keywords["options"] = {"xtol": 1e-14}
    return lambda s, lines: inv.root(mismatch, torch.ones_like(s), (s, lines), solver=chosen, **keywords)


SOLVERS = [
    "torch.newton",
    "opaque",
    "implicit_function",
    pytest.param("scipy.fsolve", marks=pytest.mark.plugin("invlayer-scipy")),
]


def real_loss(v: Tensor) -> Tensor:
    """A real function of voltages that is not symmetric in them, nor holomorphic."""
    weight = torch.linspace(0.5, 1.5, v.numel()).reshape(v.shape)
    return (weight * v.abs() ** 2 + weight.flip(0) * v.angle() + (weight * v**3).imag).sum()


def compare_with_unrolled(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Values, first and second derivatives."""
    results = []
    for function in (layer, unrolled_voltages):
        s, lines = loads(2).requires_grad_(), LINES.clone().requires_grad_()
        v = function(s, lines)
        first = torch.autograd.grad(real_loss(v), (s, lines), create_graph=True)
        second = torch.autograd.grad(sum(real_loss(g) for g in first), (s, lines))
        results.append((v, *first, *second))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.complex128
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_power_flow(solver: str) -> None:
    compare_with_unrolled(flow(solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_power_flow_by_finite_differences(solver: str) -> None:
    inputs = (loads(2).requires_grad_(), LINES.clone().requires_grad_())
    assert gradcheck(flow(solver), inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(flow(solver), (loads().requires_grad_(), inputs[1]))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f: torch.func.grad(lambda r: real_loss(f(r))),
    "jacrev": lambda f: torch.func.jacrev(lambda r: torch.view_as_real(f(r))),
    "jacfwd": lambda f: torch.func.jacfwd(lambda r: torch.view_as_real(f(r))),
    "hessian": lambda f: torch.func.hessian(lambda r: real_loss(f(r))),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(lambda r: real_loss(f(r)))),
    "vmap": torch.vmap,
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda r: real_loss(f(r)))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_transforms(name: str, solver: str) -> None:
    """With respect to real parts, where every transform of torch is at home."""
    s = loads(2)
    transform = TRANSFORMS[name]

    def of(layer: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda active: layer(torch.complex(active, 0.3 - active / 4), LINES)

    ours, theirs = transform(of(flow(solver)))(s.real), transform(of(unrolled_voltages))(s.real)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_functional_gradient_with_respect_to_complex_tensors() -> None:
    s = loads(2)
    ours = torch.func.grad(lambda s, c: real_loss(flow()(s, c)), argnums=(0, 1))(s, LINES)
    theirs = torch.func.grad(lambda s, c: real_loss(unrolled_voltages(s, c)), argnums=(0, 1))(s, LINES)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    mapped = torch.vmap(torch.func.grad(lambda s: real_loss(flow()(s, LINES))))(s)
    expected = torch.vmap(torch.func.grad(lambda s: real_loss(unrolled_voltages(s, LINES))))(s)
    torch.testing.assert_close(mapped, expected, **TIGHT)
    tangent = loads(2).flip(0)
    pushed = torch.func.jvp(lambda s: flow()(s, LINES), (s,), (tangent,))[1]
    expected = torch.func.jvp(lambda s: unrolled_voltages(s, LINES), (s,), (tangent,))[1]
    torch.testing.assert_close(pushed, expected, **TIGHT)


def test_holomorphic_against_the_formula() -> None:
    """y² = c: dy/dc = 1/(2y), so a cotangent g becomes g · conj(1/(2y)) in torch's convention."""
    c = torch.tensor([[1 + 2j, -3 + 0.5j]], requires_grad=True, dtype=torch.complex128)
    y = inv.root(lambda y, c: y**2 - c, c.detach() ** 0.5 + 0.1, c)
    cotangent = torch.tensor([[0.3 - 1j, 2 + 0.7j]], dtype=torch.complex128)
    (gradient,) = torch.autograd.grad(y, c, cotangent)
    torch.testing.assert_close(y.detach(), c.detach().sqrt(), **TIGHT)
    torch.testing.assert_close(gradient, cotangent * (1 / (2 * c.detach().sqrt())).conj(), **TIGHT)


def test_not_holomorphic_against_the_formula() -> None:
    """y + conj(y)/2 = c: y = (c − conj(c)/2) · 4/3."""
    c = torch.tensor([1 + 2j, -3 + 0.5j], requires_grad=True, dtype=torch.complex128)
    y = inv.root(lambda y, c: y + y.conj() / 2 - c, torch.zeros_like(c), c)
    exact = (c - c.conj() / 2) * 4 / 3
    cotangent = torch.tensor([0.3 - 1j, 2 + 0.7j], dtype=torch.complex128)
    torch.testing.assert_close(y, exact, **TIGHT)
    torch.testing.assert_close(
        torch.autograd.grad(y, c, cotangent), torch.autograd.grad(exact, c, cotangent), **TIGHT
    )


def contraction(y: Tensor, c: Tensor) -> Tensor:
    return 0.3 * torch.sin(y) * y.conj() + 0.2 * y.roll(1, -1) + c


def iterated(c: Tensor) -> Tensor:
    y = torch.zeros_like(c)
    for _ in range(200):
        y = contraction(y, c)
    return y


@pytest.mark.parametrize("solver", ["torch.newton", lambda y0, c: iterated(c)], ids=["native", "callable"])
def test_fixed_point(solver: Any) -> None:
    c = (0.3 * loads(2)).requires_grad_()
    layer = lambda c: inv.fixed_point(contraction, torch.zeros_like(c), c, solver=solver)  # noqa: E731
    y, expected = layer(c), iterated(c)
    torch.testing.assert_close(y, expected, **TIGHT)
    ours, theirs = (torch.autograd.grad(real_loss(v), c)[0] for v in (y, expected))
    torch.testing.assert_close(ours, theirs, **TIGHT)
    assert gradcheck(layer, c, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, c)


def test_inverse() -> None:
    """g = the principal square root, by NumPy; f(y) = y²."""
    x = torch.tensor([[1 + 2j, -3 + 0.5j]], requires_grad=True, dtype=torch.complex128)
    layer = lambda x: inv.inverse(x, inv.from_numpy(np.sqrt), f=torch.square)  # noqa: E731
    torch.testing.assert_close(layer(x), x.sqrt(), **TIGHT)
    assert gradcheck(layer, x, check_forward_ad=True)
    assert gradgradcheck(layer, x)


def test_real_unknowns_and_complex_args() -> None:
    """The angle and modulus that a phasor has: real y, complex arg, no holomorphy anywhere."""
    z = torch.tensor([[1 + 2j], [0.3 - 1j]], requires_grad=True, dtype=torch.complex128)

    def polar(y: Tensor, z: Tensor) -> Tensor:
        gap = torch.polar(y[..., 0], y[..., 1]) - z[..., 0]
        return torch.view_as_real(gap)

    def solver(y0: Tensor, z: Tensor) -> Tensor:
        return torch.cat([z.abs(), z.angle()], -1)

    for chosen in (solver, "torch.newton"):
        layer = lambda z: inv.root(polar, solver(z, z.detach()) + 0.1, z, solver=chosen)  # noqa: B023, E731
        y, exact = layer(z), torch.cat([z.abs(), z.angle()], -1)
        torch.testing.assert_close(y, exact, **TIGHT)
        assert y.dtype == torch.float64
        ours, theirs = (torch.autograd.grad(v.pow(3).sum(), z)[0] for v in (y, exact))
        torch.testing.assert_close(ours, theirs, **TIGHT)
        assert gradcheck(layer, z, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(layer, z)


def test_complex_unknowns_and_real_args() -> None:
    a = torch.tensor([[1.5, 0.4], [2.0, 3.0]], requires_grad=True)
    layer = lambda a: inv.root(lambda y, a: y**2 + y * a + 2 * a, -0.5 + 1j * ONES, a)  # noqa: E731
    y, exact = layer(a), (-a + 1j * (8 * a - a**2).sqrt()) / 2
    torch.testing.assert_close(y, exact, **TIGHT)
    (gradient,) = torch.autograd.grad(real_loss(y), a)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, torch.autograd.grad(real_loss(exact), a)[0], **TIGHT)
    assert gradcheck(layer, a, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, a)


def test_complex_and_real_leaves_together() -> None:
    """Voltages, and a real scale of the loads such that the first bus drops to |v₁| = 0.97."""
    s = loads(2).requires_grad_()

    def conditions(y: dict[str, Tensor], s: Tensor) -> dict[str, Tensor]:
        return {
            "flow": mismatch(y["v"], y["scale"].unsqueeze(-1) * s, LINES),
            "drop": y["v"][..., 0].abs() - 0.97,
        }

    def layer(s: Tensor) -> tuple[Tensor, Tensor]:
        y0 = {"v": torch.ones_like(s), "scale": -torch.ones(2)}
        y = inv.root(conditions, y0, s, event_dims={"v": 1, "scale": 0})
        return y["v"], y["scale"]

    v, scale = layer(s)
    torch.testing.assert_close(v[:, 0].abs(), torch.full((2,), 0.97))
    torch.testing.assert_close(unrolled_voltages(scale.unsqueeze(-1) * s, LINES), v, **TIGHT)
    assert (v.dtype, scale.dtype) == (torch.complex128, torch.float64)
    assert gradcheck(layer, s, check_forward_ad=True)
    assert gradgradcheck(layer, s)


def test_captured_complex_parameter() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lines = nn.Parameter(LINES.clone())

        def forward(self, v: Tensor, s: Tensor) -> Tensor:
            return mismatch(v, s, self.lines)

    module, s = Flow(), loads(2)
    real_loss(inv.RootLayer(module)(s, y0=torch.ones_like(s))).backward()
    lines = LINES.clone().requires_grad_()
    real_loss(unrolled_voltages(s, lines)).backward()
    torch.testing.assert_close(module.lines.grad, lines.grad, **TIGHT)


@pytest.mark.parametrize("where", ["loads", "guess"])
def test_failed_sample(where: str) -> None:
    """A NaN load spoils its own sample; the gradient of the shared lines stays that of the others."""
    s, lines = loads(3), LINES.clone().requires_grad_()
    start = torch.ones_like(s)
    (s if where == "loads" else start)[1, 0] = torch.nan
    v, info = inv.root(mismatch, start, (s, lines), on_failure="nan", return_info=True)
    assert info.ok.tolist() == [True, False, True]
    assert info.residual.shape == (3,)
    assert v.isnan().all(-1).tolist() == [False, True, False]
    (ours,) = torch.autograd.grad(v[[0, 2]].abs().sum(), lines)
    (theirs,) = torch.autograd.grad(unrolled_voltages(s[[0, 2]], lines).abs().sum(), lines)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    with pytest.raises(inv.ConvergenceError, match=r"1 of 3 samples(?s:.*)sample 1: NOT_FINITE"):
        inv.root(mismatch, start, (s, lines))


def test_power_flow_without_a_solution() -> None:
    """Beyond the nose of the PV curve there is no voltage: an error with the measured mismatch."""
    s = loads(2) * torch.tensor([[-1.0], [-40.0]])
    with pytest.raises(inv.ConvergenceError, match=r"1 of 2 samples(?s:.*)sample 1: (NOT|FALSE)_CONVERGE"):
        flow()(s, LINES)


@pytest.mark.parametrize("singular", ["lstsq", "damped", "nan", "zero", "raise"])
def test_singular_jacobian(singular: str) -> None:
    """conj(y) y = c fixes the modulus alone: J has rank one."""
    c = torch.tensor([4.0 + 0j], dtype=torch.complex128, requires_grad=True)
    adjoint = inv.adjoints.Implicit(singular=singular)
    y = inv.root(
        lambda y, c: y * y.conj() - c, torch.full_like(c, 2.0), c, solver=lambda y0, c: y0, adjoint=adjoint
    )
    if singular == "raise":
        with pytest.raises(inv.SingularJacobianError):
            y.abs().sum().backward()
        return
    y.abs().sum().backward()  # |y| = √c, whatever the angle
    expected = {"lstsq": 0.25, "damped": 0.25, "zero": 0.0, "nan": torch.nan}[singular]
    torch.testing.assert_close(c.grad.real, torch.tensor([expected]), equal_nan=True, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "keywords",
    [
        {"polish": 2},
        {"polish": "auto"},
        {"adjoint": inv.adjoints.Implicit(linear_solver=inv.linear.GMRES())},
        {"adjoint": inv.adjoints.Implicit(linear_solver=inv.linear.BiCGStab())},
    ],
    ids=["polish", "auto", "GMRES", "BiCGStab"],
)
def test_other_settings(keywords: dict[str, Any]) -> None:
    compare_with_unrolled(flow("opaque", **keywords))


SHAPES = [(), (2,), (2, 3), (0, 2), (2, 0)]


@pytest.mark.parametrize(
    ("shape", "event_dims"), [(shape, dims) for shape in SHAPES for dims in range(len(shape) + 1)]
)
def test_shapes(shape: tuple[int, ...], event_dims: int) -> None:
    c = torch.randn(shape, dtype=torch.complex128, requires_grad=True)
    y, info = inv.root(
        lambda y, c: y + 0.2 * y.conj() - c,
        torch.zeros(shape) + 0j,
        c,
        event_dims=event_dims,
        return_info=True,
    )
    exact = (c - 0.2 * c.conj()) / 0.96
    assert info.ok.shape == shape[: len(shape) - event_dims]
    torch.testing.assert_close(y, exact)
    ours, theirs = (torch.autograd.grad(v.real.pow(2).sum() + v.imag.sum(), c)[0] for v in (y, exact))
    torch.testing.assert_close(ours, theirs)


def test_lazily_conjugated_and_negated_tensors() -> None:
    """``conj()`` is a flag until someone reads: in y0, args, residual, and what a NumPy solver gets."""
    c = torch.tensor([[1 + 2j, -3 + 0.5j]], dtype=torch.complex128)
    assert c.conj().is_conj()
    assert c.conj().imag.is_neg()
    exact = c.conj().sqrt()
    start, args = (exact + 0.1).conj_physical().conj(), (c.conj(), c.conj().imag)
    conditions = lambda y, c, b: (y**2 - c).conj() + 0 * b  # noqa: E731
    for solver in ("torch.newton", inv.from_numpy(lambda y0, c, b: np.sqrt(c))):
        y = inv.root(conditions, start, args, solver=solver)
        torch.testing.assert_close(y, exact, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("solver", ["torch.newton", "opaque", "implicit_function"])
def test_dtype_in_is_dtype_out(dtype: torch.dtype, solver: str) -> None:
    s, lines = loads(2).to(dtype).requires_grad_(), LINES.to(dtype).requires_grad_()
    v = flow(solver)(s, lines)
    grads = torch.autograd.grad(real_loss(v), (s, lines))
    assert v.dtype == grads[0].dtype == grads[1].dtype == dtype
    tolerance = 1e-10 if dtype == torch.complex128 else 2e-5
    torch.testing.assert_close(
        v.to(torch.complex128), unrolled_voltages(loads(2), LINES), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["root", "implicit_function", "inverse"])
def test_own_jacobian_is_refused(kind: str) -> None:
    c = torch.ones(1, 2, dtype=torch.complex128, requires_grad=True)
    jacobian = lambda y, *args: torch.diag_embed(2 * y)  # noqa: E731
    calls = {
        "root": lambda: inv.root(lambda y, c: y**2 - c, c, c, jacobian=jacobian),
        "implicit_function": lambda: inv.implicit_function(lambda y, c: y**2 - c, jacobian=jacobian)(
            torch.sqrt
        )(c),
        "inverse": lambda: inv.inverse(c, torch.sqrt, jacobian=jacobian),
    }
    with pytest.raises(
        inv.ConditionsError, match=r"jacobian= came with complex unknowns .*leave jacobian out"
    ):
        calls[kind]()


def test_complex_residual_of_real_unknowns_says_what_to_do() -> None:
    with pytest.raises(inv.ConditionsError, match=r"returned dtype torch\.complex128;.*give a complex y0"):
        inv.root(lambda y: y**2 + 1j, torch.ones(2))


def test_real_residual_of_complex_unknowns_is_half_the_equations() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"2 equations per system for 4 unknowns \(y \(2,\) torch.complex"
    ):
        inv.root(lambda y: y.abs() - 1, ONES)


def test_batch_jacobian_takes_real_tensors() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"batch_jacobian: y has dtype torch\.complex128; .*view_as_real"
    ):
        inv.batch_jacobian(torch.square, ONES)
