"""Run a per-sample solver over a batch, one sample after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from invlayer_core.execution.outcome import Outcome
from invlayer_core.execution.samples import SampleRecord
from invlayer_core.execution.workload import Workload

__all__ = ["run_serially"]


def run_serially(workload: Workload, done: Callable[[], Any]) -> Outcome:
    """Solve every sample alone; a failing one leaves a NaN row, a status and a message.

    Parameters
    ----------
    workload : Workload
    done : callable
        Called whenever a sample is done.
    """
    record = SampleRecord(workload.y0, done)
    for index in workload.todo:
        record.add(index, workload.report(index))
    return record.outcome("serial")
