"""The engine on a device that is not the CPU, without having one.

What is proven: through forward, backward, double backward, forward mode, ``torch.func`` and every policy, no
op is given tensors of two devices; results lie on the device of the inputs; they are bit for bit those of the
CPU (each op runs the CPU's kernel); and a torch-native solve copies nothing to another device.
``torch.newton`` takes part with its true control flow, because the tensors of this harness have values.

What is not: that the kernels of a real device agree, and what they do inside. That is for ``test_cuda.py``.

``fakegpu`` differs from ``meta`` in one thing that matters: autograd gives it a thread of its own for the
backward, as it does CUDA. Where torch cannot register it, ``meta`` gives the same verdict on devices.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.devices.controls import CONTROLS, REFUSALS
from tests.devices.scenarios import SCENARIOS, Picard

DEVICE = "fakegpu"
ON_META = ("newton", "batched_cotangents", "failed_nan")
CROSSING = ("numpy_serial", "numpy_lockstep", "numpy_function")  # a solver on the other side of the border
NATIVE = [name for name in SCENARIOS if name not in CROSSING]
# torch numbers the levels of is_grads_batched per thread, and runs the backward of a device in a thread of
# its own: _functorch.plain then asks for level 0 instead of 1. The CPU, and meta, need no other thread.


def run(device: str, *names: str) -> dict[str, Any]:
    """What became of the scenarios and controls, from a process of their own."""
    script = str(Path(__file__).with_name("run_on_device.py"))
    ran = subprocess.run(
        [sys.executable, script, device, *names], capture_output=True, text=True, check=False
    )
    if "cannot import name '_setup_privateuseone_for_python_backend" in ran.stderr:
        pytest.skip("this torch cannot register a device from Python")
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return run(DEVICE)


@pytest.fixture(scope="module")
def report_of_meta() -> dict[str, Any]:
    return run("meta", *ON_META, *CONTROLS)


def assert_as_on_the_cpu(outcome: dict[str, Any], device: str) -> None:
    assert outcome.get("error") is None
    assert outcome["devices"] == [device]
    assert all(outcome["equal"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_runs_on_the_device_as_on_the_cpu(report: dict[str, Any], name: str) -> None:
    """No mismatch, outputs and gradients on the device, the same numbers."""
    assert_as_on_the_cpu(report[name], DEVICE)


@pytest.mark.parametrize("name", NATIVE)
def test_a_torch_native_solve_never_leaves_the_device(report: dict[str, Any], name: str) -> None:
    assert report[name].get("copies", []) == []


@pytest.mark.parametrize("name", ON_META)
def test_meta_gives_the_same_verdict(report_of_meta: dict[str, Any], name: str) -> None:
    assert_as_on_the_cpu(report_of_meta[name], "meta")
    assert report_of_meta[name]["copies"] == []


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_on_the_device_as_on_the_cpu(report: dict[str, Any], name: str) -> None:
    """The decision to raise, and what its message needs, work on device tensors too."""
    _, pattern = REFUSALS[name]
    assert_message(report[name], pattern)


# --- controls: the harness can say no -----------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLS)
def test_harness_stops_what_a_device_would_stop(
    report: dict[str, Any], report_of_meta: dict[str, Any], name: str
) -> None:
    """CPU constants in f, a Jacobian on the CPU, and an engine that forgets ``device=``."""
    _, pattern = CONTROLS[name]
    assert_message(report[name], pattern)
    assert_message(report_of_meta[name], pattern)


def test_harness_sees_copies(report: dict[str, Any]) -> None:
    assert len(report["numpy_function"]["copies"]) == 2  # x to NumPy, y back


def test_without_values_the_first_host_decision_stops_the_spine(report: dict[str, Any]) -> None:
    """Why the harness has values: torch's fake tensors cannot answer the certificate's ``bool(...)``."""
    assert_message(report["without_values"], r"DataDependentOutputException: aten._local_scalar_dense")


def assert_message(message: str, pattern: str) -> None:
    assert re.search(pattern, message, re.DOTALL), message


# --- the border: what a per-sample NumPy solver on the host costs -------------------------------------


def traffic(outcome: dict[str, Any]) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """How often what shape went from where to where."""
    return Counter((source, target, tuple(shape)) for _, source, target, shape in outcome["copies"])


def test_only_y_residual_and_jacobian_cross_the_border_serially(report: dict[str, Any]) -> None:
    """At first, of the batch at once: the guesses out, and F there with the points it was taken at. Then for
    each of 3 samples and each evaluation y in, and F or J out; at the end y, status and iterations of the
    batch in. The args, of shapes (5,) and (3, 7), stay.
    """
    residuals = Picard.residuals - 1  # beyond that at the start
    assert traffic(report["numpy_serial"]) == {
        (DEVICE, "cpu", (3, 2)): 3,
        (DEVICE, "cpu", (1, 2)): 3 * residuals,
        (DEVICE, "cpu", (2, 2)): 3 * Picard.jacobians,
        ("cpu", DEVICE, (1, 2)): 3 * (residuals + Picard.jacobians),
        ("cpu", DEVICE, (3, 2)): 1,
        ("cpu", DEVICE, (3,)): 2,
    }


def test_lockstep_crosses_the_border_once_a_round(report: dict[str, Any]) -> None:
    """Each round: y of all samples in, F or J of all samples out. Before the first, the guesses out, what
    rests where nothing is asked, and F at the start with its points.
    """
    residuals = Picard.residuals - 1  # beyond that at the start
    assert traffic(report["numpy_lockstep"]) == {
        (DEVICE, "cpu", (3, 2)): residuals + 4,
        (DEVICE, "cpu", (3, 2, 2)): Picard.jacobians,
        ("cpu", DEVICE, (3, 2)): residuals + Picard.jacobians + 1,
        ("cpu", DEVICE, (3,)): 2,
    }
