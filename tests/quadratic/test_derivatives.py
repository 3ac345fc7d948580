"""Derivatives of every order: against finite differences, and against a KKT system that torch records."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.quadratic.programs import NAMES, TryAll, kkt_solution, leaves, program
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import invlayer_core as inv


def layer(*args: Tensor, names: tuple[str, ...] = NAMES, solver: Any = "torch.qp") -> Tensor:
    x, multipliers = inv.qp(
        **{"P": None, **dict(zip(names, args, strict=True))}, solver=solver, return_multipliers=True
    )
    return torch.cat([x, *multipliers], -1)


def oracle(*args: Tensor, names: tuple[str, ...] = NAMES) -> Tensor:
    """z of one program, on the active set at which the layer stands."""
    given = dict(zip(names, args, strict=True))
    z = layer(*(t.detach() for t in args), names=names)
    active = z[3:] > 0
    active[: 1 if "A" in names else 0] = True
    return kkt_solution(given, active)


@pytest.mark.parametrize("batched", ["", "q", "P q G h A b lb ub", "G h lb"])
def test_gradcheck_in_both_modes_and_twice(batched: str) -> None:
    """Entry by entry for one program; for batches along directions, which meet every entry at once."""
    args = tuple(leaves(program(batched=batched, batch=2)).values())
    fast = bool(batched)
    assert gradcheck(layer, args, check_forward_ad=True, check_batched_grad=True, fast_mode=fast)
    assert gradgradcheck(layer, args, check_batched_grad=not batched, fast_mode=True)


@pytest.mark.parametrize("names", ["P q", "P q G h", "P q A b", "P q lb", "P q ub", "q lb ub"])
def test_gradcheck_of_subsets(names: str) -> None:
    given = program(names)
    if "P" not in given:
        given["q"] = given["q"] / given["q"].abs()
    inputs = leaves(given)
    if "P" not in given:
        inputs["q"] = inputs["q"].detach()
    kept = tuple(given)
    assert gradcheck(lambda *args: layer(*args, names=kept, solver=TryAll()), tuple(inputs.values()))


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_gradcheck_of_the_short_way(noise: float) -> None:
    """One plain program by a per-sample solver, exact or to be polished: both orders, mapped too."""
    args = tuple(leaves(program()).values())
    short = functools.partial(layer, solver=TryAll(noise))
    assert "SingleProgram" in _graph(short(*args))
    assert gradcheck(short, args, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(short, args, check_batched_grad=True, fast_mode=True)


def test_solution_can_be_written_into() -> None:
    """What the caller does with x is no affair of its derivative."""
    given = leaves(program())
    x = inv.qp(**given, solver=TryAll())
    wanted = torch.autograd.grad(x.sum(), list(given.values()), retain_graph=True)
    with torch.no_grad():
        x.fill_(7.0)
    found = torch.autograd.grad(x.mul_(2.0).sum(), list(given.values()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - 2 * theirs).abs().max() <= 1e-12


def _graph(tensor: Tensor) -> str:
    seen, stack = [], [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and len(seen) < 50:
            seen.append(type(node).__name__)
            stack += [following for following, _ in node.next_functions]
    return " ".join(seen)


NEEDS_SPARSE_LU = pytest.mark.plugin("invlayer-scipy")


@pytest.mark.parametrize(
    "sparse", ["", pytest.param("P G A", marks=NEEDS_SPARSE_LU), pytest.param("G", marks=NEEDS_SPARSE_LU)]
)
@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("n", [4, 60])
def test_short_and_general_way_agree(n: int, noise: float, sparse: str) -> None:
    """By an inverse, a Schur complement or sparse factors; with noise, the search goes over several sets."""
    torch.manual_seed(1)
    draw = functools.partial(torch.randn, dtype=torch.float64)
    root, inside = draw(n, n), 0.3 * draw(n)
    given = {"P": root @ root.mT / n + 0.1 * torch.eye(n).double(), "q": 3 * draw(n)}
    for matrix, limit, rows in (("G", "h", n), ("A", "b", 2)):
        given[matrix] = draw(rows, n)
        given[limit] = given[matrix] @ inside
    given["h"] = given["h"] + draw(n).abs()
    given["lb"], given["ub"] = inside - 1, inside + draw(n).abs()
    with torch.no_grad():
        x, multipliers = inv.qp(**given, solver="torch.qp", return_multipliers=True)
        exact = torch.cat([x, *multipliers]).numpy()
    noisy = exact + noise * np.random.default_rng(0).standard_normal(len(exact))
    inputs = {k: t.to_sparse() if k in sparse.split() else t.clone() for k, t in given.items()}
    for tensor in inputs.values():
        tensor.requires_grad_()

    class Handing(inv.Solver):
        def solve(self, problem, y0, options):
            return inv.SolverResult(y=noisy)

    both, systems = [], 0
    for keywords in ({}, {"return_info": True}):  # which asks for the general way
        answer = inv.qp(**inputs, solver=Handing(), return_multipliers=True, **keywords)
        if keywords:
            answer, info = answer
            systems = info.aux[0]["systems"]
        x, (nu, lam, low, up) = answer
        assert ("SingleProgram" in _graph(x)) is not bool(keywords)
        value = x.cos().sum() + nu.sum() + lam.square().sum() + low.sum() - up.exp().sum()
        grads = torch.autograd.grad(value, list(inputs.values()))
        both.append((x, *(g.to_dense() if g.is_sparse else g for g in grads)))
    assert systems > 1 or noise * n < 1
    for ours, theirs in zip(*both, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * (1 + theirs.abs().max())


def test_first_and_second_derivatives_are_those_of_the_kkt_system() -> None:
    args = tuple(leaves(program()).values())
    weights = torch.randn(10, dtype=torch.float64)

    def slopes(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = (function(*args)[: len(weights)] * weights).sum()
        first = torch.autograd.grad(value, args, create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), args)
        return *first, *second

    for ours, theirs in zip(slopes(layer), slopes(oracle), strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * (1 + theirs.abs().max())


def cubed(q: Tensor, h: Tensor, P: Tensor, rest: dict[str, Tensor]) -> Tensor:
    return (inv.qp(P, q, h=h, solver="torch.qp", **rest) ** 3).sum()


@pytest.fixture
def parts() -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    given = program()
    return (given.pop("q"), given.pop("h"), given.pop("P")), given


def test_hessians_agree_in_every_mode(parts) -> None:
    args, rest = parts
    rev, fwd = torch.func.jacrev, torch.func.jacfwd

    def function(*args: Tensor) -> Tensor:
        return cubed(*args, rest)

    wanted = torch.autograd.functional.hessian(function, args)
    for outer in (rev, fwd):
        for inner in (rev, fwd):
            found = outer(inner(function, argnums=(0, 1, 2)), argnums=(0, 1, 2))(*args)
            for row, right in zip(found, wanted, strict=True):
                for block, its in zip(row, right, strict=True):
                    assert (block - its).abs().max() <= 1e-11 * (1 + its.abs().max())


def test_third_derivative(parts) -> None:
    (q, h, P), rest = parts

    def along(t: Tensor) -> Tensor:
        return cubed(q + t, h, P * (1 + t), rest)

    t, step = torch.zeros((), dtype=torch.float64), 1e-3
    third = torch.func.grad(torch.func.grad(torch.func.grad(along)))(t)
    second = torch.func.grad(torch.func.grad(along))
    difference = (second(t + step) - second(t - step)) / (2 * step)
    assert abs(third - difference) <= 1e-4 * (1 + abs(third))


def test_vmap_and_its_nestings(parts) -> None:
    (q, h, P), rest = parts
    qs = q + torch.randn(4, 3, dtype=torch.float64)
    Ps = torch.stack([P + i * 0.1 * torch.eye(3) for i in range(2)])

    def solution(q: Tensor, P: Tensor) -> Tensor:
        return inv.qp(P, q, h=h, solver="torch.qp", **rest)

    whole = solution(qs, Ps.unsqueeze(1))
    nested = torch.vmap(torch.vmap(solution, in_dims=(0, None)), in_dims=(None, 0))(qs, Ps)
    assert torch.allclose(nested, whole, rtol=0, atol=1e-13)
    assert torch.allclose(torch.vmap(lambda P: solution(qs, P))(Ps), whole, rtol=0, atol=1e-13)
    slope = torch.func.grad(lambda q, P: (solution(q, P) ** 2).sum(), argnums=1)
    mapped = torch.vmap(slope, in_dims=(0, None))(qs, P)
    assert torch.allclose(mapped, torch.stack([slope(q, P) for q in qs]), rtol=0, atol=1e-12)
    summed = torch.func.grad(lambda P: (torch.vmap(solution, in_dims=(0, None))(qs, P) ** 2).sum())(P)
    assert torch.allclose(summed, mapped.sum(0), rtol=0, atol=1e-12)


def test_per_sample_solver_under_vmap(parts) -> None:
    (q, h, P), rest = parts
    qs = q + torch.randn(3, 3, dtype=torch.float64)
    mapped = torch.vmap(lambda q: inv.qp(P, q, h=h, solver=TryAll(), **rest))(qs)
    assert torch.allclose(mapped, inv.qp(P, qs, h=h, solver=TryAll(), **rest), rtol=0, atol=1e-13)


def test_factors_are_made_once_for_polish_and_all_cotangents(monkeypatch: pytest.MonkeyPatch) -> None:
    from invlayer_core.linear.saddle_point import bank

    made = []
    original = bank.make_saddle_point
    monkeypatch.setattr(bank, "make_saddle_point", lambda *args: made.append(args) or original(*args))
    given = leaves(program(batched="q"))
    x = inv.qp(**given, solver=TryAll())
    assert not made  # exact already: nothing is factorised before the backward pass
    for _ in range(3):
        x.sum().backward(retain_graph=True)
    assert len(made) == 1
    x = inv.qp(**given, solver=TryAll(noise=1e-7))
    x.sum().backward()
    assert len(made) == 2  # by the polish, and not again


def test_samples_do_not_touch_each_other() -> None:
    given = program(batched="q h", batch=4)
    spoiled = {**given, "q": given["q"].clone()}
    spoiled["q"][2] = torch.nan

    def run(arguments: dict[str, Tensor]) -> tuple[Tensor, ...]:
        inputs = leaves(arguments)
        x = inv.qp(**inputs, solver="torch.qp", on_failure="nan")
        x[[0, 1, 3]].sum().backward()
        return x.detach(), inputs["q"].grad, inputs["h"].grad, inputs["P"].grad

    sound, odd = run(given), run(spoiled)
    for whole, other in zip(sound[:3], odd[:3], strict=True):
        assert torch.equal(whole[[0, 1, 3]], other[[0, 1, 3]])
    assert torch.allclose(sound[3], odd[3], rtol=0, atol=1e-15)


def test_compile_breaks_the_graph_and_gives_the_same() -> None:
    given = leaves(program())
    wanted = inv.qp(**given, solver="torch.qp")
    compiled = torch.compile(lambda **kw: inv.qp(**kw, solver="torch.qp"), backend="eager")
    found = compiled(**given)
    assert torch.equal(found, wanted)
    slopes = [torch.autograd.grad(x.sum(), given["q"])[0] for x in (found, wanted)]
    assert torch.equal(*slopes)
