"""Each defect is found, called by its name, and put down to the right cause."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.diagnostics import defects
from tests.diagnostics.defects import batch_of_a
from torch import Tensor

import invlayer_core as inv

VJP, JVP, BOTH = "VJP vs finite differences", "JVP vs finite differences", "VJP vs JVP"
SECOND, SYMMETRY = "double backward vs finite differences", "symmetry of the Hessian"


def examine(layer: Callable[..., object], *args: Tensor) -> inv.LayerReport:
    report = inv.check_layer(layer, *args)
    assert not report.ok
    return report


def named(report: inv.LayerReport, verdict: str) -> set[str]:
    return {row.name for row in report.rows if row.verdict == verdict}


def test_a_noisy_solver():
    report = examine(defects.noisy_solver, batch_of_a())
    row = report.row("forward noise")
    assert row.verdict == "suspicious"
    # Uniform within ±5e-7 has a standard deviation of 2.9e-7; values are near one half.
    assert 2e-7 < row.value < 1e-6
    assert not named(report, "wrong")
    assert "limited by the solver's tolerance: forward noise" in report.limit
    assert "polish=2 would lower it" in report.limit


def test_polish_lowers_the_noise_as_promised():
    @inv.implicit_function(conditions=defects.cubic, atol=1e-3, polish=2)
    def polished(a: Tensor) -> Tensor:
        return defects.noisy_solver.__wrapped__(a)

    report = inv.check_layer(polished, batch_of_a())
    assert report.ok, str(report)
    assert report.row("forward noise").value < 1e-14


def test_a_solver_that_stops_early():
    report = examine(defects.early_solver, batch_of_a())
    assert not named(report, "wrong")
    assert {"residual", VJP, JVP} <= named(report, "suspicious")
    assert "limited by the solver's tolerance: y is off by 2e-03" in report.limit


def test_conditions_that_forget_an_input():
    report = examine(defects.forgets_b, batch_of_a(), batch_of_a() + 1)
    assert {VJP, JVP} <= named(report, "wrong")
    assert report.row(BOTH).verdict == report.row("residual").verdict == "ok"
    assert "most with respect to args[1]" in report.limit
    assert "conditions do not describe what the solver returns" in report.limit


def test_a_declared_jacobian_that_is_wrong():
    report = examine(defects.wrong_declared_jacobian, batch_of_a())
    assert {VJP, JVP} <= named(report, "wrong")
    assert "jacobian= is not the Jacobian" in report.limit


def test_a_wrong_gradient():
    report = examine(defects.WrongEverywhere.apply, batch_of_a())
    assert VJP in named(report, "wrong")
    assert report.row(VJP).value == pytest.approx(0.3, rel=1e-6)
    assert "the backward differs from finite differences by 30 %" in report.limit
    assert "a derivative rule on the way is wrong" in report.limit


def test_a_gradient_that_is_wrong_in_one_sample():
    report = examine(defects.WrongInOneSample.apply, batch_of_a())
    row = report.row(VJP)
    assert row.sample == 2
    assert row.value == pytest.approx(0.3, rel=1e-6)
    assert max(row.per_sample[:2] + row.per_sample[3:]) < 1e-8
    assert "by 30 % in sample 2" in report.limit


@pytest.mark.parametrize("factor", [1 + 1e-5, 1.01, -1.0, 0.0])
def test_a_wrong_gradient_of_any_size(factor: float):
    layer = type("Off", (defects.Cubic,), {"factor": factor})
    report = examine(layer.apply, batch_of_a())
    assert report.row(VJP).verdict == "wrong"
    assert report.row(VJP).value == pytest.approx(abs(factor - 1), rel=1e-2)


def test_a_wrong_forward_mode():
    report = examine(defects.WrongInForwardMode.apply, batch_of_a())
    assert named(report, "wrong") == {JVP, BOTH}
    assert "forward mode differs from finite differences by 10 %" in report.limit
    assert "the JVP rule is wrong" in report.limit


def test_a_wrong_backward_beside_a_right_forward_mode():
    class Layer(defects.WrongEverywhere):
        @staticmethod
        def jvp(ctx: object, tangent: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return tangent / (3 * y**2 + 1)

    report = examine(Layer.apply, batch_of_a())
    assert {VJP, BOTH} <= named(report, "wrong")
    assert report.row(JVP).verdict == "ok"
    assert "the VJP rule is wrong" in report.limit


@pytest.mark.parametrize(
    "layer",
    [defects.one_newton_step, defects.BackwardWithoutGraph.apply, defects.OnceDifferentiable.apply],
    ids=["one Newton step", "no graph", "once differentiable"],
)
def test_a_second_derivative_that_is_silently_zero(layer: Callable[..., object]):
    report = examine(layer, batch_of_a())
    assert named(report, "wrong") == {SECOND}
    assert "first derivatives are right" in report.limit
    assert "silently zero" in report.limit


@pytest.mark.parametrize("layer", [defects.one_live_newton_step, defects.FrozenSlope.apply])
def test_a_second_derivative_that_is_wrong_and_not_zero(layer: Callable[..., object]):
    report = examine(layer, batch_of_a())
    assert named(report, "wrong") == {SECOND}
    assert "takes something that depends on the inputs for a constant" in report.limit


def test_an_asymmetric_hessian():
    report = examine(defects.Asymmetric.apply, batch_of_a())
    assert named(report, "wrong") == {SECOND, SYMMETRY}


def test_no_double_backward_is_said_and_is_no_defect():
    def diagonal(a: Tensor) -> Tensor:
        y = defects.exact(a)
        return inv.inverse(a, defects.exact, jacobian=torch.diag_embed(3 * y**2 + 1))

    report = inv.check_layer(diagonal, batch_of_a())
    assert report.ok
    assert report.row(SECOND).verdict == report.row(SYMMETRY).verdict == "not available"
    assert "There is no second derivative: double backward raises UnsupportedTransformError" in report.limit


def test_batchnorm_couples_samples():
    network = defects.coupled_network()
    report = examine(network, batch_of_a())
    assert named(report, "suspicious") == {"batch coupling"}
    assert not named(report, "wrong")
    assert "samples are coupled: sample" in report.limit
    assert "when the last one moves" in report.limit
    assert inv.check_layer(network.eval(), batch_of_a()).ok


def test_conditions_that_couple_samples():
    report = examine(defects.coupled_conditions, batch_of_a())
    assert report.row(VJP).verdict == "wrong"
    assert report.row("batch coupling").verdict == "suspicious"
    assert "samples are coupled, so that there is no Jacobian per sample" in report.limit


def test_a_backward_that_leaks_between_samples():
    class Leaks(defects.Cubic):
        @staticmethod
        def backward(ctx: object, cotangent: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return cotangent / (3 * y**2 + 1) + 1e-9 * cotangent.mean(0)

    row = examine(Leaks.apply, batch_of_a()).row("batch coupling")
    assert row.verdict == "suspicious"
    assert "cotangent of sample 0 alone reaches the others" in row.detail


def test_an_ill_conditioned_sample():
    report = examine(defects.ill_conditioned, batch_of_a(4, 2))
    row = report.row("conditioning of J")
    assert (row.verdict, row.sample) == ("suspicious", 2)
    assert row.value == pytest.approx(1e11, rel=1e-3)
    assert row.per_sample[0] == pytest.approx(1.0)
    assert not named(report, "wrong")
    assert "J is ill-conditioned in sample 2 (1e+11)" in report.limit


def test_a_singular_sample():
    a = torch.tensor([[1.0], [0.0], [4.0]], dtype=torch.float64)
    report = examine(defects.singular, a)
    assert report.row("conditioning of J").verdict == "wrong"
    assert "SingularJacobianError" in report.row(VJP).detail
    assert report.limit.startswith("J is singular within the accuracy of y in sample 1")


def test_a_branch_point_nearer_than_any_step():
    a = torch.tensor([[1.0], [1e-9], [4.0]], dtype=torch.float64)
    report = examine(defects.singular, a)
    assert not named(report, "wrong")
    assert "do not settle" in report.row(VJP).detail


def test_a_layer_that_keeps_state():
    report = examine(defects.stateful(), batch_of_a())
    assert report.row("determinism").verdict == "wrong"
    assert report.limit.startswith("the forward is not deterministic")


def test_dropout():
    report = examine(torch.nn.Dropout(0.5), batch_of_a())
    assert report.limit.startswith("the forward is not deterministic")


def test_an_output_that_was_detached():
    report = examine(defects.detached, batch_of_a())
    assert report.row(VJP).verdict == "wrong"
    assert "no output carries a gradient although its values change" in report.limit


def test_a_forward_that_is_not_finite():
    report = examine(lambda a: (a.amax() - a).log(), batch_of_a())
    assert report.row("determinism").verdict == "wrong"
    assert "the forward is not finite: 1 entries" in report.limit


def test_a_solver_that_fails_at_the_point_itself():
    report = examine(inv.implicit_function(conditions=defects.cubic)(lambda a: a), batch_of_a())
    assert [row.name for row in report.rows] == ["residual"]
    assert report.rows[0].verdict == "wrong"
    assert report.rows[0].value > 1
    assert len(report.rows[0].per_sample) == 4
    assert "the solver fails at this very point" in report.limit
    assert "4 of 4 samples" in str(report)


def test_samples_that_a_failure_policy_answered_for():
    def solve(_y: Tensor, a: Tensor) -> Tensor:
        return defects.exact(a) + torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64).unsqueeze(-1)

    layer = inv.RootLayer(defects.cubic, solver=solve, on_failure="zero_grad")
    a = batch_of_a()
    report = inv.check_layer(layer, a, y0=torch.zeros_like(a))
    assert report.row("residual").verdict == "wrong"
    assert report.row("residual").sample == 1
    assert "the solver fails: failed samples: 1" in report.limit


def test_a_layer_that_can_be_evaluated_at_one_point_only():
    a = batch_of_a()

    def layer(moved: Tensor) -> Tensor:
        if not torch.equal(moved, a):
            raise RuntimeError("out of the domain")
        return 2 * moved

    report = inv.check_layer(layer, a)
    assert named(report, "not available") >= {"forward noise", VJP, JVP, SECOND}
    assert "nothing could be compared: the layer could not be evaluated beside the point" in report.limit


def test_a_gradient_that_depends_on_the_values_of_others():
    class Scaled(defects.Cubic):
        @staticmethod
        def backward(ctx: object, cotangent: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return cotangent / (3 * y**2 + 1) * (1 + 1e-9 * y.mean())

    row = examine(Scaled.apply, batch_of_a()).row("batch coupling")
    assert row.verdict == "suspicious"
    assert "the gradient of sample" in row.detail
