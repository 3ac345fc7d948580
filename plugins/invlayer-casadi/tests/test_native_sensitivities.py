"""backend="native": CasADi's own sensitivities of nlpsol, and their traps."""

import copy
import pickle

import casadi as ca
import pytest
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_casadi import CasadiLayer

F64 = torch.float64


def problem() -> dict:
    x, p = ca.SX.sym("x", 3), ca.SX.sym("p", 2)
    f = ca.sumsqr(x - ca.vertcat(p, 1)) + ca.exp(x[0] * x[1])
    return {"x": x, "p": p, "f": f, "g": ca.vertcat(ca.sum1(x), x[0] - x[2] ** 2)}


BOUNDS = {"lbx": 0.1, "lbg": torch.tensor([1.0, -5.0], dtype=F64), "ubg": torch.tensor([1.0, 5.0], dtype=F64)}
P = torch.tensor([[0.2, 0.5], [-0.4, 0.7], [0.3, 0.1]], dtype=F64)


def test_they_agree_with_the_conditions() -> None:
    p, results = P.clone().requires_grad_(), []
    for backend in ("auto", "native"):
        layer = CasadiLayer(problem(), backend=backend, outputs=("x", "f", "lam_g", "lam_x"))
        outputs = layer(p, **BOUNDS)
        first = torch.autograd.grad(sum(torch.sin(each).sum() for each in outputs), p, create_graph=True)
        second = torch.autograd.grad((first[0] ** 2).sum(), p)
        results.append([*outputs, *first, *second])
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(native, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lbx", "lbg"])
def test_bounds_get_gradients(name: str) -> None:
    value = torch.full((3,), 0.1, dtype=F64) if name == "lbx" else BOUNDS["lbg"].clone()
    value.requires_grad_()
    gradients = []
    for backend in ("auto", "native"):
        given = {**BOUNDS, name: value}
        if name == "lbg":
            given["ubg"] = torch.cat([value[:1], BOUNDS["ubg"][1:]])
        x = CasadiLayer(problem(), backend=backend)(P, **given)
        gradients.append(torch.autograd.grad(x.square().sum(), value)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


def test_a_multiplier_of_zero_is_an_error_and_not_a_silent_zero() -> None:
    x, p = ca.SX.sym("x", 2), ca.SX.sym("p")
    layer = CasadiLayer({"x": x, "p": p, "f": ca.sumsqr(x), "g": x[0] - x[1] - p}, backend="native")
    p = torch.zeros(1, dtype=F64, requires_grad=True)
    with pytest.raises(inv.ConditionsError, match=r"constraint g\[0\] of sample 0 .* below min_lam=1.0e-06"):
        layer(p, lbg=0.0, ubg=0.0)
    assert not layer(p.detach(), lbg=0.0, ubg=0.0).any()  # without a gradient nothing is in doubt
    whole = problem()
    options = {"ipopt.obj_scaling_factor": 1e8}
    tiny = CasadiLayer({**whole, "f": 1e-8 * whole["f"]}, backend="native", options=options)
    with pytest.raises(inv.ConditionsError, match="holds with equality, and its multiplier"):
        tiny(P.clone().requires_grad_(), **BOUNDS)


@pytest.mark.parametrize("options", [{"min_lam": 0.0}, {"detect_simple_bounds": True}])
def test_options_that_would_be_wrong_are_refused(options: dict) -> None:
    with pytest.raises(inv.ConditionsError, match=r"sensitivities are wrong with min_lam=0"):
        CasadiLayer(problem(), backend="native", options=options)


def test_torch_func_is_refused() -> None:
    layer = CasadiLayer(problem(), backend="native")

    def solve(p: Tensor) -> Tensor:
        return layer(p, **BOUNDS)

    with pytest.raises(inv.UnsupportedTransformError, match=r"backend='native'.*torch.func"):
        torch.func.jacrev(solve)(P[0])


def test_failures_are_still_ours_to_tell_and_copies_work() -> None:
    layer = CasadiLayer(problem(), backend="native")
    with pytest.raises(inv.ConvergenceError, match="measured residual"):
        layer(P, lbx=2.0, lbg=BOUNDS["lbg"], ubg=BOUNDS["ubg"])
    expected = layer(P, **BOUNDS)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(P, **BOUNDS), expected)
