"""Layers without defect come out ok, however they are built, and nothing about them is called wrong."""

from __future__ import annotations

import pytest
import torch
from tests.diagnostics.defects import Cubic, batch_of_a, cubic, exact, solve_exactly
from tests.opaque import CASES
from torch import Tensor, nn

import invlayer_core as inv

VJP, JVP = "VJP vs finite differences", "JVP vs finite differences"
SECOND, SYMMETRY = "double backward vs finite differences", "symmetry of the Hessian"


def verdicts(report: inv.LayerReport) -> dict[str, str]:
    return {row.name: row.verdict for row in report.rows}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_with_torch_and_opaque_solvers(name: str):
    report = inv.check_layer(CASES[name].layer, *CASES[name].inputs(4))
    assert report.ok, str(report)
    expected = dict.fromkeys(verdicts(report), "ok")
    if name == "inverse-jacobian":
        expected["residual"] = "not available"
    assert verdicts(report) == expected
    assert report.batch == (4,)
    assert report.limit.startswith("nothing stands out")
    # The attainable accuracy of central differences is about eps^(2/3) = 4e-11.
    assert report.row(VJP).value < 1e-9
    assert report.row(JVP).value < 1e-9
    assert report.row(SECOND).value < 1e-8
    assert report.row("VJP vs JVP").value < 1e-14
    assert report.row(SYMMETRY).value < 1e-14


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.linear.load_state_dict({"weight": batch_of_a(3, 3) - 1.5, "bias": batch_of_a(3)})

    def forward(self, y: Tensor, a: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.linear(y)) + a


def test_the_parameters_of_a_layer_are_inputs():
    a = batch_of_a()
    report = inv.check_layer(inv.FixedPointLayer(Net()), a, y0=torch.zeros_like(a))
    assert report.inputs == ("args[0]", "parameter T.linear.weight", "parameter T.linear.bias")
    assert set(verdicts(report).values()) == {"ok"}
    assert not report.notes


def test_parameters_of_modules_in_a_closure_are_inputs():
    net = Net()
    report = inv.check_layer(lambda a: inv.fixed_point(net, torch.zeros_like(a), args=a), batch_of_a())
    assert report.inputs == ("args[0]", "parameter linear.weight", "parameter linear.bias")
    assert report.ok


NET = Net()


def uses_a_global(a: Tensor) -> Tensor:
    return inv.fixed_point(lambda y, a: NET(y, a), torch.zeros_like(a), args=a)


def test_parameters_of_modules_that_inner_functions_name_are_inputs():
    report = inv.check_layer(uses_a_global, batch_of_a())
    assert report.inputs == ("args[0]", "parameter linear.weight", "parameter linear.bias")
    assert report.ok


def test_a_network_around_a_layer():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
            self.layer = inv.RootLayer(cubic)

        def forward(self, a: Tensor) -> Tensor:
            a = self.first(a)
            return self.last(self.layer(a, y0=torch.zeros_like(a)))

    report = inv.check_layer(Network(), batch_of_a(5, 3))
    assert report.ok, str(report)
    assert len(report.inputs) == 5
    assert report.row("conditioning of J").verdict == "ok"
    assert len(report.row("residual").per_sample) == 5


@pytest.mark.parametrize("layer", [inv.RootLayer(cubic), inv.RootLayer(cubic, event_dims=0)])
def test_float32(layer: nn.Module):
    a = batch_of_a().float()
    report = inv.check_layer(layer, a, y0=torch.zeros_like(a))
    assert report.ok, str(report)
    assert report.row(VJP).value < 1e-3


def test_one_sample():
    report = inv.check_layer(inv.RootLayer(cubic), batch_of_a(3), y0=torch.zeros(3, dtype=torch.float64))
    assert report.ok
    assert report.batch == ()
    assert verdicts(report)["batch coupling"] == "not available"


def test_elementwise_scalars():
    a = batch_of_a(2, 3)
    report = inv.check_layer(inv.RootLayer(cubic, event_dims=0), a, y0=torch.zeros_like(a))
    assert report.ok
    assert report.batch == (2, 3)
    assert len(report.row("residual").per_sample) == 6


def test_no_guess_whether_an_argument_is_shared_where_batch_and_size_agree():
    layer = inv.RootLayer(lambda y, a, b: y**3 + b * y - a)
    a = batch_of_a(3, 3)
    report = inv.check_layer(layer, a, batch_of_a(3), y0=torch.zeros_like(a))
    assert report.ok
    assert "args[1] may be shared or one per sample" in report.notes[0]


def test_a_matrix_free_layer_has_no_condition_number():
    adjoint = inv.adjoints.Implicit(linear_solver=inv.linear.GMRES())
    a = batch_of_a()
    report = inv.check_layer(inv.RootLayer(cubic, adjoint=adjoint), a, y0=torch.zeros_like(a))
    assert report.ok
    assert "Krylov" in report.row("conditioning of J").detail
    assert "solved by GMRES(" in report.systems[0]


def test_which_linear_solver_auto_takes():
    a = batch_of_a()
    report = inv.check_layer(inv.RootLayer(cubic), a, y0=torch.zeros_like(a))
    assert "solved by LU() (auto: " in report.systems[0]


def test_badly_scaled_equations_are_not_ill_conditioned():
    units = torch.tensor([1.0, 1e-7, 1e7], dtype=torch.float64)
    layer = inv.RootLayer(lambda y, a: units * cubic(y, a))
    a = batch_of_a()
    row = inv.check_layer(layer, a, y0=torch.zeros_like(a)).row("conditioning of J")
    assert row.verdict == "ok"
    assert row.value > 1e13
    assert "units" in row.detail


def test_a_pytree_with_outputs_that_carry_nothing():
    def layer(a: Tensor, options: dict[str, Tensor]) -> dict[str, object]:
        y, info = inv.root(cubic, torch.zeros_like(a), args=a * options["scale"], return_info=True)
        return {"y": y, "both": (y.sum(-1), info), "steps": info.residual, "name": "cubic"}

    report = inv.check_layer(layer, batch_of_a(), options={"scale": batch_of_a(1), "count": torch.tensor(3)})
    assert report.ok, str(report)
    assert report.inputs == ("args[0]", "options['scale']")
    assert "1 of the outputs carry no gradient" in report.notes[0]


def test_implicit_function_with_aux():
    @inv.implicit_function(conditions=cubic)
    def solve(a: Tensor) -> tuple[Tensor, dict[str, int]]:
        return exact(a), {"steps": 60}

    assert inv.check_layer(solve, batch_of_a()).ok


def test_arguments_that_require_grad_are_the_inputs_if_any_do():
    layer = inv.RootLayer(lambda y, a, b: y**3 + b * y - a)
    a, b = batch_of_a(), batch_of_a().requires_grad_()
    assert inv.check_layer(layer, a, b, y0=torch.zeros_like(a)).inputs == ("args[1]",)


def test_captured_tensors_that_were_not_passed_are_named():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    layer = lambda a: inv.root(lambda y, a: w * y**3 + y - a, torch.zeros_like(a), args=a)  # noqa: E731
    report = inv.check_layer(layer, batch_of_a())
    assert report.ok
    assert "1 captured tensors that require grad (shapes (3,))" in report.notes[0]


def test_a_hand_written_function_without_forward_mode():
    report = inv.check_layer(Cubic.apply, batch_of_a())
    assert report.ok
    assert report.layer == "Cubic.apply"
    assert verdicts(report)[JVP] == "not available"
    assert verdicts(report)[VJP] == verdicts(report)[SECOND] == "ok"


def test_a_function_that_is_linear_has_a_second_derivative_of_zero():
    report = inv.check_layer(lambda a: inv.root(lambda y, a: 2 * y - a, a.detach(), args=a), batch_of_a())
    assert report.ok, str(report)


def test_under_no_grad_and_inference_mode():
    a = batch_of_a()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert inv.check_layer(inv.RootLayer(cubic, solver=solve_exactly), a, y0=torch.zeros_like(a)).ok


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize("solver", ["scipy.fsolve", "scipy.root"])
def test_scipy_solvers_at_their_default_tolerance(solver: str):
    a = batch_of_a()
    report = inv.check_layer(inv.RootLayer(cubic, solver=solver), a, y0=torch.zeros_like(a))
    assert report.ok, str(report)


def test_complex_unknowns_and_arguments():
    def conditions(z: Tensor, c: Tensor) -> Tensor:
        return z**2 + 0.1 * z.conj() - c

    c = torch.complex(batch_of_a(), 0.3 * batch_of_a())
    report = inv.check_layer(inv.RootLayer(conditions), c, y0=torch.ones_like(c))
    assert report.ok, str(report)
    assert report.batch == (4,)
    assert report.row(VJP).value < 1e-9


def test_unknowns_in_a_pytree():
    def conditions(y: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
        return {"u": y["u"] ** 3 + y["u"] - a, "v": y["v"] - y["u"].sum(-1, keepdim=True)}

    a = batch_of_a()
    y0 = {"u": torch.zeros_like(a), "v": torch.zeros(4, 1, dtype=torch.float64)}
    report = inv.check_layer(inv.RootLayer(conditions), a, y0=y0)
    assert report.ok, str(report)
    assert report.inputs == ("args[0]",)
    assert len(report.row("conditioning of J").per_sample) == 4
