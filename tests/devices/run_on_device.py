"""Run scenarios and controls on a fake device, and print what became of each as JSON.

Started by ``test_fake_device.py`` in a process of its own: ``python run_on_device.py DEVICE [NAME ...]``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the root of the repository

import torch
from tests.devices.controls import CONTROLS, REFUSALS
from tests.devices.fake_device import fake_device, register, value_of
from tests.devices.op_counter import OUTSIDE, Copy
from tests.devices.scenarios import SCENARIOS, Scenario
from torch._subclasses.fake_tensor import FakeTensorMode

import invlayer_core as inv


def compare(run: Scenario, device: str) -> dict[str, Any]:
    """Where the results lie, whether they are those of the CPU, and which copies the engine made."""
    expected = [tensor.detach() for tensor in run("cpu")]
    with fake_device() as mode:
        results = run(device)
        devices = sorted({tensor.device.type for tensor in results})
    values = [value_of(tensor).detach() for tensor in results]
    return {
        "devices": devices,
        "equal": [torch.equal(ours, theirs) for ours, theirs in zip(values, expected, strict=True)],
        "copies": [copy for copy in mode.copies if copy.station != OUTSIDE and _has_values(copy, device)],
    }


def _has_values(copy: Copy, device: str) -> bool:
    """For forward mode, torch asks the meta device what shape a product has; no values move."""
    return device == "meta" or copy.target != "meta"


def outcome(run: Scenario, device: str) -> dict[str, Any]:
    """What ``compare`` says, or the error."""
    try:
        return compare(run, device)
    except Exception as error:  # reported to the test
        return {"error": f"{type(error).__name__}: {error}"}


def failure(run: Scenario, device: str) -> str:
    """The error that ``run`` ends in."""
    try:
        with fake_device():
            run(device)
    except Exception as error:  # that is what is looked for
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def without_values(device: str) -> str:
    """The error that torch's own fake mode, which has no values, ends in."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            SCENARIOS["implicit_function"](device)
    except Exception as error:  # that is what is looked for
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(device: str, names: list[str]) -> None:
    torch.set_num_threads(1)  # the systems are tiny
    warnings.simplefilter("error", inv.PerformanceWarning)  # a detour that only the device takes is a failure
    register(device)
    wanted = lambda table: {name: table[name] for name in names or table if name in table}  # noqa: E731
    report = {name: outcome(run, device) for name, run in wanted(SCENARIOS).items()}
    errors = {name: failure(run, device) for name, (run, _) in wanted(CONTROLS | REFUSALS).items()}
    print(json.dumps(report | errors | {"without_values": without_values(device)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
