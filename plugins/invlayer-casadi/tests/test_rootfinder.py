"""CasADi's root finders: the registered solver and the layer, against closed forms and SciPy."""

import copy
import math
import pickle
import threading

import casadi as ca
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi import CasadiLayer

F64 = torch.float64
PLUGINS = pytest.mark.parametrize("plugin", ["newton", "fast_newton", "kinsol", "nlpsol"])
QUIET = {
    "newton": {"abstol": 1e-13},
    "fast_newton": {"abstol": 1e-13},
    "kinsol": {"abstol": 1e-13},
    "nlpsol": {
        "nlpsol": "ipopt",
        "nlpsol_options": {
            "ipopt.print_level": 0,
            "ipopt.sb": "yes",
            "print_time": False,
            "ipopt.tol": 1e-13,
        },
    },
}


def square(plugin: str = "newton", **options: object) -> ca.Function:
    """y² = a, elementwise, in two unknowns; no root where a < 0."""
    y, a = ca.SX.sym("y", 2), ca.SX.sym("a", 2)
    settings = {**QUIET[plugin], "show_eval_warnings": False, **options}
    return ca.rootfinder("square", plugin, {"x": y, "p": a, "g": y**2 - a}, settings)


def coupled(plugin: str = "newton") -> ca.Function:
    """A system with an output besides the root, parameters on both sides of the unknown."""
    p, y, q = ca.SX.sym("p", 2), ca.SX.sym("y", 2), ca.SX.sym("q")
    conditions = ca.vertcat(y[0] ** 3 + y[0] + y[1] - p[0], y[1] ** 3 + 2 * y[1] - q * y[0] - p[1])
    g = ca.Function("g", [p, y, q], [ca.dot(y, y) * q, conditions], ["p", "y", "q"], ["size", "residual"])
    return ca.rootfinder("coupled", plugin, g, {"implicit_input": 1, "implicit_output": 1, **QUIET[plugin]})


def values(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(batch, n, generator=generator, dtype=F64).requires_grad_() for n in (2, 1))


@PLUGINS
def test_the_layer_gives_root_outputs_and_gradients(plugin: str) -> None:
    layer, (p, q) = CasadiLayer.from_rootfinder(coupled(plugin)), values()
    size, y = layer(p, q)
    torch.testing.assert_close(y[:, 0] ** 3 + y[:, 0] + y[:, 1], p[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(size, (y * y).sum(-1, keepdim=True) * q, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(layer, (p, q), check_forward_ad=True, check_batched_grad=True)


def test_derivatives_against_unrolled_newton_to_second_order() -> None:
    layer, (p, q) = CasadiLayer.from_rootfinder(coupled()), values()

    def unrolled(p: Tensor, q: Tensor) -> Tensor:
        y = torch.zeros(3, 2, dtype=F64)
        for _ in range(12):
            zero = torch.zeros_like(y[:, 0])
            f = torch.stack(
                [y[:, 0] ** 3 + y[:, 0] + y[:, 1] - p[:, 0],
                 y[:, 1] ** 3 + 2 * y[:, 1] - q[:, 0] * y[:, 0] - p[:, 1]], -1,
            )  # fmt: skip
            rows = [3 * y[:, 0] ** 2 + 1, zero + 1, -q[:, 0], 3 * y[:, 1] ** 2 + 2]
            y = y - torch.linalg.solve(torch.stack(rows, -1).reshape(3, 2, 2), f.unsqueeze(-1)).squeeze(-1)
        return y

    results = []
    for y in (layer(p, q)[1], unrolled(p, q)):
        first = torch.autograd.grad(torch.sin(y).sum(), (p, q), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), (p, q))
        results.append([y, *first, *second])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_torch_func_on_the_layer() -> None:
    layer, (p, q) = CasadiLayer.from_rootfinder(coupled()), values()
    alone = lambda p, q: layer(p, q)[1]  # noqa: E731
    torch.testing.assert_close(torch.vmap(alone)(p, q), alone(p, q))
    reverse, forward = (torch.vmap(j(alone))(p, q) for j in (torch.func.jacrev, torch.func.jacfwd))
    torch.testing.assert_close(reverse, forward, rtol=1e-12, atol=1e-13)


def test_batch_dims_broadcast_and_the_guess_is_given() -> None:
    layer = CasadiLayer.from_rootfinder(square())
    a = torch.tensor([[1.0, 4.0], [9.0, 16.0]], dtype=F64)
    minus = layer(a, x0=-torch.ones(2, dtype=F64))
    torch.testing.assert_close(minus, -a.sqrt())
    grid = layer(a, x0=torch.ones(3, 1, 2, dtype=F64))
    torch.testing.assert_close(grid, a.sqrt().expand(3, 2, 2))
    assert layer(a[0], x0=torch.ones(2, dtype=F64)).shape == (2,)
    assert layer(a.float(), x0=torch.ones(2)).dtype == torch.float32
    assert layer(a[:0], x0=torch.ones(2, dtype=F64)).shape == (0, 2)


@PLUGINS
@pytest.mark.parametrize("bad", [math.nan, -1.0], ids=["NaN", "no root"])
def test_a_bad_sample_leaves_the_others_untouched(plugin: str, bad: float) -> None:
    a = 1 + torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    start = torch.ones(2, dtype=F64)
    layer = CasadiLayer.from_rootfinder(square(plugin), on_failure="nan", return_info=True)
    healthy, _ = layer(a, x0=start)
    a[3, 0] = bad
    a.requires_grad_()
    y, info = layer(a, x0=start)
    assert [bool(ok) for ok in info.ok] == [i != 3 for i in range(8)]
    others = torch.arange(8) != 3
    assert torch.equal(y[others], healthy[others])
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient[others], 0.5 / healthy[others], rtol=1e-9, atol=0)
    assert gradient[3].isnan().all()


@pytest.mark.parametrize("plugin", ["newton", "fast_newton"])
def test_false_successes_are_caught(plugin: str) -> None:
    function = square(plugin)
    function(ca.DM([1, 1]), ca.DM([math.nan, 1]))
    assert function.stats()["success"]  # what CasADi says, of a system of NaN
    layer = CasadiLayer.from_rootfinder(function, on_failure="zero_grad", return_info=True)
    start = torch.ones(2, dtype=F64)
    _, info = layer(torch.tensor([[math.nan, 1.0]], dtype=F64), x0=start)
    assert info.status[0] is inv.Status.NOT_FINITE
    with pytest.raises(inv.ConvergenceError, match=r"CasADi's \w+ '\w+': 1 of 1 samples"):
        CasadiLayer.from_rootfinder(function)(torch.tensor([-1.0, 1.0], dtype=F64), x0=start)
    loose = CasadiLayer.from_rootfinder(square(plugin, abstol=1e2), on_failure="nan", return_info=True)
    _, info = loose(torch.tensor([4.0, 4.0], dtype=F64), x0=start)  # the guess is as good as any
    assert info.status[0] is inv.Status.FALSE_CONVERGENCE
    assert float(info.residual) > 1


@PLUGINS
def test_the_registered_solver_on_torch_conditions(plugin: str) -> None:
    a = torch.tensor([[2.0, 3.0], [5.0, 7.0]], dtype=F64, requires_grad=True)
    options = {k: v for k, v in QUIET[plugin].items() if k not in ("nlpsol", "nlpsol_options")}
    y, info = inv.root(
        lambda y, a: y**2 - a, torch.ones_like(a), a, solver="casadi.rootfinder",
        options={"plugin": plugin, **options}, return_info=True,
    )  # fmt: skip
    torch.testing.assert_close(y**2, a, rtol=1e-8, atol=0)  # kinsol may step over to the negative root
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], 0.5 / y.detach(), rtol=1e-8, atol=0)
    assert (info.iterations > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugin": "bisection"}, r"unknown plugin 'bisection'; accepted are \['newton', 'fast_newton'"),
        ({"tol": 1}, r"casadi.rootfinder, plugin='newton': unknown options \['tol'\]; accepted are \['abs"),
        ({"plugin": "kinsol", "line_search": True}, r"plugin='kinsol': unknown options \['line_search'\]"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((TypeError, inv.ConvergenceError), match=message):
        inv.root(torch.sin, torch.ones(2, dtype=F64), solver="casadi.rootfinder", options=options)


def test_conditions_that_raise_keep_their_exception(capfd: pytest.CaptureFixture) -> None:
    def picky(y: Tensor) -> Tensor:
        if y[0].isfinite() and y[0] != 1:
            raise ArithmeticError("no connection to the data base")
        return y**2 - 2

    with pytest.raises(inv.ConvergenceError, match="ArithmeticError: no connection to the data base"):
        inv.root(picky, torch.ones(1, dtype=F64), solver="casadi.rootfinder")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: CasadiLayer.from_rootfinder(f.oracle()), r"a Function made by casadi.rootfinder"),
        (lambda f: CasadiLayer.from_rootfinder(f, threads=0), r"threads=0: accepted is a number of threads"),
        (lambda f: CasadiLayer.from_rootfinder(f)(), r"came with 0 parameters; accepted are 1: p; the guess"),
        (lambda f: CasadiLayer.from_rootfinder(f)(torch.ones(3)), r"'p' came with shape \(3,\).*batch, 2\)"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        call(square())


def test_layers_can_be_copied_and_pickled() -> None:
    layer, (p, q) = CasadiLayer.from_rootfinder(coupled(), threads=2), values()
    expected = layer(p, q)[1]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(p, q)[1], expected)


@pytest.mark.parametrize("plugin", ["newton", "kinsol"])
def test_eight_threads_on_two_layers(plugin: str) -> None:
    """200 solves of two solvers from 8 threads: no crash, and equal to serial."""
    layers = (
        CasadiLayer.from_rootfinder(coupled(plugin)),
        CasadiLayer.from_rootfinder(square(plugin), threads=3),
    )
    p, q = (tensor.detach() for tensor in values(5))
    a, start = 1 + p, torch.ones(2, dtype=F64)
    expected, wrong = (layers[0](p, q)[1], layers[1](a, x0=start)), []

    def work() -> None:
        for _ in range(25):
            same = torch.equal(layers[0](p, q)[1], expected[0]) and torch.equal(
                layers[1](a, x0=start), expected[1]
            )
            wrong.extend([] if same else [1])

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
