"""CasADi's integrators as layers, against closed forms."""

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
TIGHT = {"reltol": 1e-11, "abstol": 1e-13}


def oscillator(plugin: str, times: object = 1.5, **options: object) -> ca.Function:
    """x″ = −p₀ x − p₁ x′ + u, with the integral of x² beside it; as a DAE for idas."""
    x, p, u, z = ca.SX.sym("x", 2), ca.SX.sym("p", 2), ca.SX.sym("u"), ca.SX.sym("z")
    force = -p[0] * x[0] - p[1] * x[1] + u
    problem = {"x": x, "p": p, "u": u, "ode": ca.vertcat(x[1], force), "quad": x[0] ** 2}
    if plugin == "idas":
        problem |= {"z": z, "alg": z - force, "ode": ca.vertcat(x[1], z)}
    return ca.integrator("oscillator", plugin, problem, 0.0, times, {**options})


def closed_form(x: Tensor, p: Tensor, u: Tensor, t: float) -> Tensor:
    """Underdamped, with constant u."""
    rest = u / p[..., :1]
    rate = p[..., 1:] / 2
    omega = torch.sqrt(p[..., :1] - rate**2)
    a = x[..., :1] - rest
    b = (x[..., 1:] + rate * a) / omega
    decay, sine, cosine = torch.exp(-rate * t), torch.sin(omega * t), torch.cos(omega * t)
    position = decay * (a * cosine + b * sine)
    velocity = decay * ((omega * b - rate * a) * cosine - (omega * a + rate * b) * sine)
    return torch.cat([position + rest, velocity], -1)


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, p, u = (torch.rand(batch, n, generator=generator, dtype=F64) for n in (2, 2, 1))
    p = p * torch.tensor([3.0, 0.5], dtype=F64) + torch.tensor([2.0, 0.1], dtype=F64)
    return x.requires_grad_(), p.requires_grad_(), u.requires_grad_()


@pytest.mark.parametrize(
    ("plugin", "options", "accuracy"),
    [
        ("cvodes", {}, 1e-4),
        ("cvodes", TIGHT, 1e-8),
        ("idas", {}, 1e-3),
        ("idas", TIGHT, 1e-6),
        ("rk", {"number_of_finite_elements": 200}, 1e-8),
        ("collocation", {"number_of_finite_elements": 40}, 1e-8),
    ],
)
def test_values_and_gradients_are_as_accurate_as_documented(
    plugin: str, options: dict, accuracy: float
) -> None:
    layer, (x, p, u) = CasadiLayer.from_integrator(oscillator(plugin, **options)), inputs()
    weights = torch.tensor([1.0, -0.7], dtype=F64)
    results = []
    for end in (layer(x, p=p, u=u), closed_form(x, p, u, 1.5)):
        first = torch.autograd.grad((end * weights).sum(), (x, p, u), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), (x, p, u))
        results.append((end, *first, *second))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=10 * accuracy, atol=accuracy)


def test_forward_mode_and_torch_func() -> None:
    layer, (x, p, u) = CasadiLayer.from_integrator(oscillator("cvodes", **TIGHT)), inputs()
    end = lambda x, p, u: layer(x, p=p, u=u)  # noqa: E731
    exact = torch.vmap(torch.func.jacrev(lambda x, p, u: closed_form(x, p, u, 1.5), argnums=1))(x, p, u)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        ours = torch.vmap(transform(end, argnums=1))(x, p, u)
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-8)


def test_outputs_and_grids() -> None:
    x, p, u = (tensor.detach() for tensor in inputs())
    layer = CasadiLayer.from_integrator(oscillator("cvodes", [0.5, 1.5], **TIGHT), outputs=("xf", "qf"))
    u_grid = u.unsqueeze(-1).expand(3, 1, 2)
    path, quadrature = layer(x, p=p, u=u_grid)
    assert (path.shape, quadrature.shape) == ((3, 2, 2), (3, 1, 2))
    for k, t in enumerate((0.5, 1.5)):
        torch.testing.assert_close(path[..., k], closed_form(x, p, u, t), rtol=1e-8, atol=1e-9)
    assert (quadrature > 0).all()
    algebraic = CasadiLayer.from_integrator(oscillator("idas", **TIGHT), outputs=("zf",))(x, p=p, u=u)
    end = closed_form(x, p, u, 1.5)
    force = -p[:, :1] * end[:, :1] - p[:, 1:] * end[:, 1:] + u
    torch.testing.assert_close(algebraic[0], force, rtol=1e-6, atol=1e-7)


def test_a_sample_that_fails_is_alone() -> None:
    x = ca.SX.sym("x")
    blow_up = ca.integrator("blow_up", "cvodes", {"x": x, "ode": x**2}, 0.0, 1.0, {"max_num_steps": 500})
    start = torch.tensor([[0.2], [2.0], [math.nan], [0.4]], dtype=F64)  # x(t) = 1 / (1/x₀ − t)
    with pytest.raises(inv.ConvergenceError, match=r"'blow_up': 2 of 4 samples .*sample 1"):
        CasadiLayer.from_integrator(blow_up)(start)
    with pytest.warns(inv.ConvergenceWarning, match="2 of 4 samples are NaN"):
        CasadiLayer.from_integrator(blow_up, on_failure="warn")(start)
    layer, start = CasadiLayer.from_integrator(blow_up, on_failure="nan"), start.requires_grad_()
    end = layer(start)
    (gradient,) = torch.autograd.grad(end.sum(), start)
    good = torch.tensor([0, 3])
    torch.testing.assert_close(end[good], 1 / (1 / start[good] - 1), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient[good], 1 / (1 - start[good].detach()) ** 2, rtol=1e-3, atol=0)
    assert torch.equal(end[good], layer(start[good]))
    assert end[1:3].isnan().all()
    assert gradient[1:3].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: CasadiLayer.from_integrator(f.slice("g", [0, 2, 3], [0])), r"made by casadi.integrator"),
        (
            lambda f: CasadiLayer.from_integrator(f, outputs="zf"),
            r"outputs='zf': accepted are .*\['xf', 'qf'\]",
        ),
        (
            lambda f: CasadiLayer.from_integrator(f, on_failure="zero"),
            r"on_failure='zero'.: accepted are 'raise'",
        ),
        (lambda f: CasadiLayer.from_integrator(f)(torch.ones(2)), r"p is missing; accepted are x0, p, u"),
        (
            lambda f: CasadiLayer.from_integrator(f)(torch.ones(3), p=torch.ones(2), u=torch.ones(1)),
            r"'x0' came",
        ),
        (
            lambda f: CasadiLayer.from_integrator(f)(*map(torch.ones, (2, 2, 1, 1))),
            r"came with z0; accepted are",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(call, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        call(oscillator("cvodes"))


def test_copies_pickles_and_threads() -> None:
    layer, (x, p, u) = CasadiLayer.from_integrator(oscillator("cvodes")), inputs()
    expected, wrong = layer(x, p=p, u=u).detach(), []
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, p=p, u=u), expected)

    def work() -> None:
        for _ in range(8):
            wrong.extend([] if torch.equal(layer(x, p=p, u=u), expected) else [1])

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
