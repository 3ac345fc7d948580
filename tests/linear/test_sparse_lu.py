"""SparseLU as the linear solver of the derivative: gradients, certification, policies, shared factors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import invlayer_core as inv
from invlayer_core.adjoints import Implicit
from invlayer_core.linear import Factor, SparseDirectSolver, SparseLU, SparseMatrix

pytestmark = pytest.mark.usefixtures("float64")

N = 6
MASK = (torch.eye(N) + torch.diag(torch.ones(N - 1), 1) + torch.diag(torch.ones(N - 2), -2)) != 0
MADE: list[int] = []  # one entry for each factorisation in the test that is running


class DenseFactors(SparseDirectSolver):
    """NumPy's dense solve behind the contract of a sparse one: the core is tested without SciPy."""

    def factorise(self, matrix: SparseMatrix, options: Mapping[str, Any]) -> Factor:
        if options:
            raise TypeError(f"DenseFactors takes no options; got {sorted(options)}.")
        MADE.append(matrix.size)
        cols = np.repeat(np.arange(matrix.size), np.diff(matrix.column_pointers))
        dense = np.zeros((matrix.size, matrix.size))
        dense[matrix.rows, cols] = matrix.values
        if np.linalg.matrix_rank(dense) < matrix.size:
            raise ZeroDivisionError("exactly singular")
        return Factor(lambda b: np.linalg.solve(dense, b), lambda b: np.linalg.solve(dense.T, b))


@pytest.fixture(autouse=True)
def _none_made() -> None:
    MADE.clear()


def sparse(pattern: Any = MASK, **settings: Any) -> SparseLU:
    return SparseLU(pattern, solver=DenseFactors(), **settings)


def conditions(y: Tensor, a: Tensor, t: Tensor) -> Tensor:
    return y @ torch.where(MASK, a, 0.0).T + 0.1 * y**3 * (1 + 0.1 * t) - t


def problem(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    a = 2 * torch.eye(N) + 0.7 * torch.randn(N, N, generator=generator).double()
    return a, torch.randn(*batch, N, generator=generator).double()


def layer(method: Any, a: Tensor, t: Tensor, **keywords: Any) -> Tensor:
    adjoint = Implicit(linear_solver=method, singular=keywords.pop("singular", "raise"))
    result: Tensor = inv.root(conditions, torch.zeros_like(t), (a, t), adjoint=adjoint, **keywords)
    return result


def value(method: Any) -> Callable[[Tensor], Tensor]:
    a = problem()[0]
    return lambda t: (layer(method, a, t) ** 2).sum()


# --- derivatives --------------------------------------------------------------------------------------------


def test_gradcheck_to_second_order() -> None:
    a, t = problem(2)
    inputs = (a.requires_grad_(), t.requires_grad_())
    function = lambda a, t: layer(sparse(), a, t)  # noqa: E731
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("pattern", [MASK, None, torch.ones(N, N).bool()], ids=["known", "detected", "full"])
def test_backward_to_third_order_equals_lu(pattern: Tensor | None) -> None:
    found = []
    for method in (sparse(pattern), inv.linear.LU()):
        a, t = (tensor.requires_grad_() for tensor in problem(3))
        orders, last = [], (layer(method, a, t) ** 2).sum()
        for order in range(3):
            grads = torch.autograd.grad(last, (a, t), create_graph=order < 2)
            orders += grads
            last = sum((g**2).sum() for g in grads)  # type: ignore[assignment]
        found.append(orders)
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacrev(jacrev(jacrev))": lambda f: jacrev(jacrev(jacrev(f))),
    "vmap(grad)": lambda f: vmap(grad(f)),
    "vmap(hessian)": lambda f: vmap(hessian(f)),
    "hessian of vmap": lambda f: hessian(lambda t: vmap(f)(t).sum()),
    "jvp": lambda f: lambda t: jvp(f, (t,), (t.cos(),))[1],
    "grad of jvp": lambda f: grad(lambda t: jvp(f, (t,), (t.cos(),))[1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_equals_lu(transform: str) -> None:
    t = problem(2)[1]
    ours, exact = (TRANSFORMS[transform](value(method))(t) for method in (sparse(), inv.linear.LU()))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


def test_two_mapped_dimensions() -> None:
    t = problem(2, 3, 2)[1]
    ours, exact = (vmap(vmap(grad(value(m))))(t) for m in (sparse(), inv.linear.LU()))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


def test_mapped_cotangents_in_eager_mode() -> None:
    a, t = problem(3)
    t.requires_grad_()
    many = torch.randn(4, 3, N, generator=torch.Generator().manual_seed(1)).double()
    y = layer(sparse(), a, t)
    (ours,) = torch.autograd.grad(y, t, many, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, t, each, retain_graph=True)[0] for each in many]
    torch.testing.assert_close(ours, torch.stack(one_by_one), rtol=1e-14, atol=1e-14)
    with pytest.raises(inv.UnsupportedTransformError, match=r"is_grads_batched=True, create_graph=True"):
        torch.autograd.grad(y, t, many, is_grads_batched=True, create_graph=True)


def test_eager_forward_mode() -> None:
    a, t = problem(3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t, t.cos())
        ours = torch.autograd.forward_ad.unpack_dual(layer(sparse(), a, dual)).tangent
    exact = jvp(lambda t: layer(inv.linear.LU(), a, t), (t,), (t.cos(),))[1]
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-14)


def nested(method: Any, t: Tensor) -> Tensor:
    """A layer within the conditions of another."""
    adjoint = Implicit(linear_solver=method)

    def inner(y: Tensor, t: Tensor) -> Tensor:
        result: Tensor = inv.root(
            lambda z, y, t: z + 0.1 * z**3 - y * t, torch.zeros_like(y), (y, t), adjoint=adjoint
        )
        return result

    start = torch.full_like(t, 0.5).detach()
    result: Tensor = inv.root(lambda y, t: inner(y, t) + y - t - 1, start, t, adjoint=adjoint)
    return result


@pytest.mark.parametrize("transform", ["grad", "hessian", "jacrev(jacrev)", "jacfwd(jacfwd)"])
def test_a_layer_within_another(transform: str) -> None:
    t = 0.5 + problem(2)[1][:, :3].abs()
    ours, exact = (
        TRANSFORMS[transform](lambda t, m=m: nested(m, t).pow(2).sum())(t)  # type: ignore[misc]
        for m in (sparse(torch.eye(3).bool()), inv.linear.LU())
    )
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_functional_hessian(vectorize: bool) -> None:
    t = problem(2)[1]
    ours = torch.autograd.functional.hessian(value(sparse()), t, vectorize=vectorize)
    torch.testing.assert_close(ours, hessian(value(inv.linear.LU()))(t), rtol=1e-12, atol=1e-13)


def test_checkpoint() -> None:
    a, t = problem(2)
    t.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(lambda t: layer(sparse(), a, t), t, use_reentrant=False)
    exact = torch.autograd.grad(layer(sparse(), a, t).sum(), t)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), t)[0], exact)


def test_several_threads_share_one_graph() -> None:
    a, t = problem(3)
    t.requires_grad_()
    y = layer(sparse(), a, t)
    (alone,) = torch.autograd.grad(layer(sparse(), a, t).sum(), t)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: torch.autograd.grad(y.sum(), t, retain_graph=True)[0], range(8)))
    for each in found:
        assert torch.equal(each, alone)


def test_an_empty_batch() -> None:
    t = torch.zeros(0, N, requires_grad=True)
    assert torch.autograd.grad(layer(sparse(), problem()[0], t).sum(), t)[0].shape == (0, N)
    assert MADE == []


def test_second_derivatives_do_not_need_what_the_pattern_leaves_out() -> None:
    """The entries beside the diagonal are zero at y = 0, but not their derivatives."""
    f = lambda y, t: y**3 + y + y.roll(1, -1) ** 2 - t  # noqa: E731
    t = torch.zeros(4, requires_grad=True)  # y = 0, where ∂F_i/∂y_{i-1} = 2 y_{i-1} = 0
    diagonal = sparse(torch.eye(4).bool())
    found = []
    for method in (diagonal, inv.linear.LU()):
        y = inv.root(f, torch.zeros(4), t, adjoint=Implicit(linear_solver=method))
        (first,) = torch.autograd.grad(y @ torch.arange(1.0, 5.0), t, create_graph=True)
        found.append((first, torch.autograd.grad(first.sum(), t)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=1e-14)
    assert (found[0][1] != 0).all()


def test_finite_differences() -> None:
    a, t = problem(2)
    t.requires_grad_()
    (ours,) = torch.autograd.grad((layer(sparse(), a, t) ** 2).sum(), t)
    h, flat = 1e-5, t.detach().flatten()
    steps = h * torch.eye(flat.numel())
    ask = lambda x: float((layer(sparse(), a, x.reshape(t.shape)) ** 2).sum())  # noqa: E731
    differences = torch.tensor([(ask(flat + s) - ask(flat - s)) / (2 * h) for s in steps])
    torch.testing.assert_close(ours.flatten(), differences, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    a, t = problem(3)
    exact = grad(lambda t: (layer(inv.linear.LU(), a, t) ** 2).sum())(t)
    low = t.to(dtype).requires_grad_()
    y = layer(sparse(), a.to(dtype), low)
    (ours,) = torch.autograd.grad((y**2).sum(), low)
    assert ours.dtype == dtype
    loose = 2e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(ours.double(), exact, rtol=loose, atol=loose)


def test_a_captured_parameter_and_event_dims() -> None:
    w = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    t = torch.ones(4, 2, 3)
    f = lambda y, t: y + 0.1 * w * y**3 - t  # noqa: E731
    ours, exact = (
        torch.autograd.grad(inv.root(f, t, t, event_dims=2, adjoint=Implicit(linear_solver=method)).sum(), w)[
            0
        ]
        for method in (sparse(torch.eye(6).bool()), inv.linear.LU())
    )
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-14)


# --- one factorisation --------------------------------------------------------------------------------------


def test_one_factorisation_serves_all_cotangents_and_both_orders() -> None:
    a, t = (tensor.requires_grad_() for tensor in problem(2))
    y = layer(sparse(), a, t)
    assert MADE == []
    for row in torch.eye(N):
        torch.autograd.grad(y, t, row.expand(2, N), retain_graph=True)
    (first,) = torch.autograd.grad((y**2).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), t, create_graph=True)
    torch.autograd.grad(second.sum(), (a, t))
    assert len(MADE) == 2  # one per sample


def test_a_hessian_within_torch_func_makes_one_factor_per_sample() -> None:
    hessian(value(sparse()))(problem(2)[1])
    assert len(MADE) == 2
    MADE.clear()
    vmap(hessian(value(sparse())))(problem(2)[1])
    assert len(MADE) == 2


def test_factors_are_freed_with_the_graph() -> None:
    kept: list[weakref.ref[Any]] = []

    class Watched(DenseFactors):
        def factorise(self, matrix: SparseMatrix, options: Mapping[str, Any]) -> Factor:
            factor = super().factorise(matrix, options)
            kept.append(weakref.ref(factor))
            return factor

    a, t = problem(2)
    t.requires_grad_()
    gc.collect()
    gc.disable()
    try:
        y = layer(SparseLU(MASK, solver=Watched()), a, t)
        (first,) = torch.autograd.grad((y**2).sum(), t, create_graph=True)
        first.sum().backward()
        assert [ref() is not None for ref in kept] == [True, True]
        del y, first
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


# --- certification ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", range(0, int(MASK.sum()), 3))
def test_a_pattern_that_misses_an_entry_is_refused(entry: int) -> None:
    rows, cols = MASK.nonzero(as_tuple=True)
    kept = torch.arange(len(rows)) != entry
    small = inv.jacobians.SparsityPattern(rows[kept], cols[kept], (N, N))
    t = problem(3)[1].requires_grad_()
    with pytest.raises(
        inv.ConditionsError, match=r"SparseLU\(pattern=.*14 entries\)\) misses entries.*column"
    ):
        layer(sparse(small), problem()[0], t).sum().backward()


def test_a_transposed_pattern_is_refused() -> None:
    t = problem(2)[1].requires_grad_()
    with pytest.raises(
        inv.ConditionsError, match=r"equations as rows and unknowns as columns.*detect_sparsity"
    ):
        layer(sparse(MASK.T), problem()[0], t).sum().backward()


def test_a_pattern_of_another_size_is_refused() -> None:
    t = problem(2)[1].requires_grad_()
    with pytest.raises(inv.ConditionsError, match=r"5 x 5.*Jacobian is 6 x 6 per sample"):
        layer(sparse(torch.eye(5).bool()), problem()[0], t).sum().backward()


def test_conditions_that_mix_samples_are_refused() -> None:
    t = torch.ones(3, 4, requires_grad=True)
    f = lambda y, t: y + 0.1 * y.mean(0) - t  # noqa: E731
    y = inv.root(f, torch.ones(3, 4), t, solver=lambda y0, t: t - 0.1 * t.mean(0) / 1.1,
                 adjoint=Implicit(linear_solver=sparse(torch.eye(4).bool())))  # fmt: skip
    with pytest.raises(inv.ConditionsError, match=r"mix the samples of the batch \(3,\)"):
        y.sum().backward()


def test_conditions_that_are_not_square_are_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    y = inv.inverse(x, lambda x: torch.cat([x, x]) / 2, f=lambda y: y[:2] + y[2:],
                    adjoint=Implicit(linear_solver=sparse(None)))  # fmt: skip
    with pytest.raises(inv.ConditionsError, match=r"2 equations for 4 unknowns; accepted with SparseLU"):
        y.sum().backward()


class Sloppy(DenseFactors):
    """Solves with a relative error of 1e-4 in every entry."""

    def factorise(self, matrix: SparseMatrix, options: Mapping[str, Any]) -> Factor:
        exact = super().factorise(matrix, options)
        off = 1 + 1e-4 * np.cos(np.arange(matrix.size))
        return Factor(lambda b: exact.solve(b) * off, lambda b: exact.solve_transposed(b) * off)


class Wrong(DenseFactors):
    """Solves another system."""

    def factorise(self, matrix: SparseMatrix, options: Mapping[str, Any]) -> Factor:
        return Factor(lambda b: -b, lambda b: -b)


def test_an_inaccurate_factor_is_refined() -> None:
    a, t = problem(3)
    t.requires_grad_()
    ours, exact = (
        torch.autograd.grad((layer(method, a, t) ** 2).sum(), t)[0]
        for method in (SparseLU(MASK, solver=Sloppy()), inv.linear.LU())
    )
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_a_solver_that_lies_is_caught() -> None:
    t = problem(2)[1].requires_grad_()
    with pytest.raises(
        inv.SingularJacobianError, match=r"SparseLU with Wrong.*sample 0 \(relative residual \d\.\de[+-]\d+\)"
    ):
        layer(SparseLU(MASK, solver=Wrong()), problem()[0], t).sum().backward()


@pytest.mark.parametrize("result", [np.ones(2), np.ones((6, 1)), np.ones(6, dtype=int)], ids=str)
def test_a_factor_that_returns_something_else_is_refused(result: np.ndarray) -> None:
    class Odd(DenseFactors):
        def factorise(self, matrix: SparseMatrix, options: Mapping[str, Any]) -> Factor:
            return Factor(lambda b: result, lambda b: result)

    t = problem(2)[1].requires_grad_()
    with pytest.raises(inv.ConditionsError, match=r"a Factor returned .* right-hand side of shape \(6,\)"):
        layer(SparseLU(MASK, solver=Odd()), problem()[0], t).sum().backward()


def test_an_ill_conditioned_but_regular_jacobian_is_accepted() -> None:
    """κ = 1e10: no solution can have a relative residual of 7e-11, but rounding explains what is left."""
    u = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double())[0]
    a = u @ torch.diag(10.0 ** torch.linspace(0, -10, N)) @ u.T
    t = (a @ torch.ones(N)).requires_grad_()
    y = inv.root(lambda y, t: y @ a.T - t, torch.ones(N), t, solver=lambda y0, t: torch.linalg.solve(a, t),
                 adjoint=Implicit(linear_solver=sparse(torch.ones(N, N).bool())))  # fmt: skip
    (ours,) = torch.autograd.grad(y.sum(), t)
    exact = torch.linalg.solve(a.T, torch.ones(N))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=0)


def test_tiny_equations_are_regular() -> None:
    d = torch.full((2, 1), 3e-12, requires_grad=True)
    y = inv.root(lambda y, d: 1e-12 * y - d, torch.ones(2, 1), d, atol=1e-20,
                 adjoint=Implicit(linear_solver=sparse(torch.ones(1, 1).bool())))  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(y.sum(), d)[0], torch.full((2, 1), 1e12))


# --- singular and failed samples ----------------------------------------------------------------------------


def roots(t: Tensor, singular: str, exact: Callable[[Tensor], Tensor] = torch.sqrt) -> Tensor:
    solve = inv.implicit_function(
        conditions=lambda y, t: y**2 - t,
        adjoint=Implicit(linear_solver=sparse(torch.eye(2).bool()), singular=singular),  # type: ignore[arg-type]
    )(exact)
    result: Tensor = solve(t)
    return result


@pytest.mark.parametrize("nudge", [0.0, 1e-9], ids=["on the double root", "near it"])
@pytest.mark.parametrize("singular", ["raise", "nan", "zero"])
def test_a_singular_sample_is_decided_and_does_not_reach_the_others(singular: str, nudge: float) -> None:
    t = torch.tensor([[2.0, 3.0], [0.0, 5.0], [7.0, 8.0]], requires_grad=True)
    alone = t.detach()[[0, 2]].requires_grad_()
    (clean,) = torch.autograd.grad(roots(alone, singular).sum(), alone)
    y = roots(t, singular, lambda t: torch.sqrt(t) + nudge * (t == 0))
    for _ in range(2):  # the second cotangent finds the factors there
        if singular == "raise":
            with pytest.raises(inv.SingularJacobianError, match=r"sample 1 \(relative .*of 3 samples"):
                torch.autograd.grad(y.sum(), t, retain_graph=True)
            continue
        (gradient,) = torch.autograd.grad(y.sum(), t, retain_graph=True)
        assert torch.equal(gradient[[0, 2]], clean)
        assert gradient[1].isnan().any() if singular == "nan" else (gradient[1] == 0).all()


def test_a_singular_sample_of_which_nothing_is_asked_gives_zero() -> None:
    t = torch.tensor([[2.0, 3.0], [0.0, 5.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(roots(t, "raise")[0].sum(), t)
    torch.testing.assert_close(gradient[0], 0.5 / t.detach()[0].sqrt(), rtol=1e-15, atol=0)
    assert (gradient[1] == 0).all()


def test_conditions_that_do_not_depend_on_y_are_singular() -> None:
    t = torch.zeros(2, requires_grad=True)
    adjoint = Implicit(linear_solver=sparse(None))
    y = inv.root(lambda y, t: t * 1.0, torch.zeros(2), t, solver=lambda y0, t: y0, adjoint=adjoint)
    with pytest.raises(inv.SingularJacobianError, match=r"sample 0"):
        y.sum().backward()


def test_nan_in_a_cotangent_stays_with_its_sample() -> None:
    a, t = problem(3)
    t.requires_grad_()
    y = layer(sparse(), a, t)
    cotangent = torch.ones(3, N)
    (clean,) = torch.autograd.grad(y, t, cotangent, retain_graph=True)
    cotangent[1, 2] = torch.nan
    (spoilt,) = torch.autograd.grad(y, t, cotangent, retain_graph=True)
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1].isnan().any()


@pytest.mark.parametrize("on_failure", ["nan", "zero_grad"])
def test_failed_samples_get_their_own_answer(on_failure: str) -> None:
    t = torch.tensor([[2.0, 3.0], [-1.0, 5.0], [7.0, 8.0]], requires_grad=True)
    y = inv.root(lambda y, t: y**2 - t, torch.ones(3, 2), t, on_failure=on_failure,
                 adjoint=Implicit(linear_solver=sparse(torch.eye(2).bool())))  # fmt: skip
    (gradient,) = torch.autograd.grad(y.sum(), t)
    torch.testing.assert_close(gradient[[0, 2]], 0.5 / t.detach()[[0, 2]].sqrt(), rtol=1e-12, atol=0)
    assert gradient[1].isnan().all() if on_failure == "nan" else (gradient[1] == 0).all()


# --- factors of the forward solve ---------------------------------------------------------------------------


def dense_factor(matrix: Tensor) -> Factor:
    dense = matrix.numpy()
    return Factor(lambda b: np.linalg.solve(dense, b), lambda b: np.linalg.solve(dense.T, b))


def handing_over(form: str, how_far: float) -> tuple[Callable[[Tensor], Any], Callable[..., Tensor]]:
    """A solver of y_i + y_i³ / 10 + y_{i-1} / 5 = t_i that hands over factors from ``how_far`` off y."""
    f = lambda y, t: y + 0.1 * y**3 + 0.2 * y.roll(1, -1) - t  # noqa: E731

    def solve(t: Tensor) -> Any:
        y, shift = torch.zeros_like(t), 0.2 * torch.eye(N).roll(1, 0)
        for _ in range(30):
            y = y - torch.linalg.solve(
                torch.diag_embed(1 + 0.3 * y**2) + shift, f(y, t).unsqueeze(-1)
            ).squeeze(-1)
        beside = y + how_far * torch.linspace(1, 2, N)
        factors = [
            dense_factor(block) for block in torch.diag_embed(1 + 0.3 * beside**2).reshape(-1, N, N) + shift
        ]
        given = {"one": factors[0], "list": factors, "mapping": {"factor": factors, "steps": 30}}
        return y, given[form]

    return solve, f


PATTERN = torch.eye(N).bool() | torch.eye(N).bool().roll(1, 0)


def handed(form: str, how_far: float, t: Tensor, *, method: Any = None) -> Any:
    solve, f = handing_over(form, how_far)
    method = method or sparse(PATTERN)
    return inv.implicit_function(conditions=f, adjoint=Implicit(linear_solver=method))(solve)(t)


def gradient_of(y: Any, t: Tensor) -> Tensor:
    return torch.autograd.grad((y[0] if isinstance(y, tuple) else y).pow(2).sum(), t)[0]


@pytest.mark.parametrize("how_far", [0.0, 1e-5, 0.3], ids=["at y", "one step off", "needs GMRES"])
@pytest.mark.parametrize(
    ("form", "batch"), [("one", ()), ("list", (3,)), ("mapping", (3,)), ("list", (2, 2))]
)
def test_a_factor_handed_over_is_used_and_gives_the_exact_gradient(
    form: str, batch: tuple[int, ...], how_far: float
) -> None:
    t = problem(*batch)[1].requires_grad_()
    y = handed(form, how_far, t)
    assert isinstance(y, tuple) == (form == "mapping")
    ours = gradient_of(y, t)
    assert MADE == []
    exact = gradient_of(handed(form, how_far, t, method=inv.linear.LU()), t)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


def test_second_derivatives_with_a_factor_handed_over() -> None:
    t = problem()[1].requires_grad_()
    found = []
    for method in (None, inv.linear.LU()):
        (first,) = torch.autograd.grad(
            handed("one", 1e-6, t, method=method).pow(2).sum(), t, create_graph=True
        )
        found.append(torch.autograd.grad(first.pow(2).sum(), t)[0])
    assert MADE == []
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)


def test_a_useless_factor_is_replaced_with_a_warning_and_for_its_sample_alone() -> None:
    t = problem(3)[1].requires_grad_()
    solve, f = handing_over("list", 0.0)

    def spoilt(t: Tensor) -> Any:
        y, factors = solve(t)
        zero = Factor(np.zeros_like, np.zeros_like)
        return y, [factors[0], zero, None]

    decorate = inv.implicit_function(conditions=f, adjoint=Implicit(linear_solver=sparse(PATTERN)))
    with pytest.warns(
        inv.PerformanceWarning, match=r"handed over does not solve .* samples \[1\].*fresh one"
    ):
        ours = gradient_of(decorate(spoilt)(t), t)
    good = gradient_of(handed("list", 0.0, t), t)
    torch.testing.assert_close(ours, good, rtol=1e-12, atol=1e-13)
    assert torch.equal(ours[0], good[0])


def test_a_factor_of_nan_does_not_reach_the_others() -> None:
    t = problem(3)[1].requires_grad_()
    solve, f = handing_over("list", 0.3)
    nan = Factor(lambda b: b * np.nan, lambda b: b * np.nan)

    def spoilt(t: Tensor) -> Any:
        y, factors = solve(t)
        return y, [factors[0], nan, factors[2]]

    decorate = inv.implicit_function(conditions=f, adjoint=Implicit(linear_solver=sparse(PATTERN)))
    with pytest.warns(inv.PerformanceWarning, match=r"samples \[1\]"):
        ours = gradient_of(decorate(spoilt)(t), t)
    good = gradient_of(handed("list", 0.3, t), t)
    assert torch.equal(ours[[0, 2]], good[[0, 2]])
    torch.testing.assert_close(ours[1], good[1], rtol=1e-9, atol=1e-10)


def test_the_number_of_factors_must_be_that_of_the_systems() -> None:
    t = problem(3)[1].requires_grad_()
    with pytest.raises(inv.ConditionsError, match=r"handed over 1 factors for a batch of 3 systems"):
        handed("one", 0.0, t)


def test_a_registered_solver_hands_over_a_factor_by_its_aux() -> None:
    solve, f = handing_over("list", 1e-6)

    class Handing(inv.Solver):
        def solve(self, problem: Any, y0: Any, options: Mapping[str, Any]) -> inv.SolverResult:
            y, (factor,) = solve(t.detach()[problem.index : problem.index + 1])
            return inv.SolverResult(y=y[0].numpy(), aux={"factor": factor})

    t = problem(3)[1].requires_grad_()
    adjoint = Implicit(linear_solver=sparse(PATTERN))
    ours = gradient_of(inv.root(f, torch.zeros(3, N), t, solver=Handing(), adjoint=adjoint), t)
    assert MADE == []
    torch.testing.assert_close(ours, gradient_of(handed("list", 0.0, t), t), rtol=1e-11, atol=1e-12)


def test_torch_func_makes_a_fresh_factor_without_a_word() -> None:
    t = problem()[1]
    exact = grad(lambda t: handed("one", 0.0, t, method=inv.linear.LU()).pow(2).sum())(t)
    torch.testing.assert_close(grad(lambda t: handed("one", 0.0, t).pow(2).sum())(t), exact)
    assert MADE == [N]


# --- settings -----------------------------------------------------------------------------------------------


def test_settings_can_be_copied() -> None:
    settings = Implicit(linear_solver=sparse(rtol=1e-9))
    twin = copy.deepcopy(settings).linear_solver
    assert isinstance(twin, SparseLU)
    assert (twin.pattern, twin.rtol) == (inv.jacobians.SparsityPattern.of(MASK), 1e-9)


def test_options_reach_the_solver() -> None:
    t = problem(2)[1].requires_grad_()
    with pytest.raises(TypeError, match=r"DenseFactors takes no options; got \['fill'\]"):
        layer(sparse(options={"fill": 2}), problem()[0], t).sum().backward()


@pytest.mark.parametrize("singular", ["lstsq", "damped"])
def test_policies_that_need_a_dense_jacobian_are_refused(singular: str) -> None:
    with pytest.raises(
        inv.ConditionsError, match=rf"singular='{singular}', linear_solver=SparseLU.*take LU\(\)"
    ):
        Implicit(linear_solver=sparse(), singular=singular)  # type: ignore[arg-type]


def test_a_pattern_that_is_not_square_is_refused() -> None:
    with pytest.raises(inv.ConditionsError, match=r"SparseLU\(pattern=.*2 x 3.*accepted is a square one"):
        sparse(torch.ones(2, 3).bool())


def test_names_that_no_plugin_registers() -> None:
    with pytest.raises(
        inv.SolverNotFoundError, match=r"SparseLU\(solver='acme.lu'\): no linear solver of that"
    ):
        SparseLU(solver="acme.lu")
    with pytest.raises(inv.SolverNotFoundError, match=r"(?s)solver='scipy.spl'.*pip install invlayer-scipy"):
        Implicit(linear_solver="scipy.spl")


def test_a_large_detection_says_how_to_do_it_once() -> None:
    n = 600
    t = torch.linspace(1, 2, n, requires_grad=True)
    y = inv.root(lambda y, t: y**3 - t, torch.ones(n), t, solver=lambda y0, t: t ** (1 / 3),
                 adjoint=Implicit(linear_solver=sparse(None)))  # fmt: skip
    with pytest.warns(
        inv.PerformanceWarning, match=r"detected one of 600 entries.*detect_sparsity\(f, y, args\)"
    ):
        (ours,) = torch.autograd.grad(y.sum(), t)
    torch.testing.assert_close(ours, t.detach() ** (-2 / 3) / 3, rtol=1e-13, atol=0)


def test_nested_forward_mode_that_would_be_dense_raises() -> None:
    t = torch.ones(12_000)
    f = inv.implicit_function(conditions=lambda y, t: y**3 - t, adjoint=Implicit(linear_solver=sparse(None)))(
        lambda t: t ** (1 / 3)
    )
    inner = lambda t: jvp(f, (t,), (t,))[1]  # noqa: E731
    with pytest.raises(inv.UnsupportedTransformError, match=r"nested forward mode.*12000 unknowns.*1 GiB"):
        jvp(inner, (t,), (t,))
