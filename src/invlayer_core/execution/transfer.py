"""Workloads and reports as bytes, for another process.

The workload of a chunk holds everything its solves need: conditions, args, solver and options, sent once.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from importlib import import_module
from typing import Any

from invlayer_core.errors import ConditionsError
from invlayer_core.execution.samples import SampleReport
from invlayer_core.execution.workload import Workload

__all__ = ["pack_report", "pack_workload", "unpack_workload"]


def pack_workload(workload: Workload, called: str) -> bytes:
    """A workload as bytes; with cloudpickle where that is installed, which takes lambdas and closures too.

    Raises
    ------
    ConditionsError
        If conditions, args, solver or options cannot be pickled.
    """
    try:
        payload: bytes = _pickler().dumps(_compact(workload))
    except Exception as error:  # what is pickled has its own code for that, which may raise anything
        raise ConditionsError(
            f"{called} sends the conditions, their args and the solver to other processes, and they cannot "
            f"be pickled ({type(error).__name__}: {error}). Accepted are functions and classes at the top "
            "level of a module, and tensors; install cloudpickle for lambdas and closures, pass what they "
            "hold through args=, or choose batch='auto'."
        ) from error
    return payload


def _compact(workload: Workload) -> Workload:
    """The workload with its own rows alone: a slice would be pickled with all that it was cut from."""
    theta = tuple(tensor.clone() for tensor in workload.theta)
    system, given = workload.system, len(workload.system.arguments.tensors)
    return replace(
        workload,
        system=replace(system, arguments=replace(system.arguments, tensors=theta[:given])),
        y0=workload.y0.clone(),
        theta=theta,
        option_tensors=tuple(tensor.clone() for tensor in workload.option_tensors),
        options=replace(workload.options, tensors=workload.options.tensors[:0]),
        limits=replace(workload.limits, executor=None, progress=False),
        at_start=None,
    )


def _pickler() -> Any:
    try:
        return import_module("cloudpickle")
    except ImportError:
        return pickle


def unpack_workload(payload: bytes) -> Workload:
    """The workload again, in the process that is to solve it.

    Raises
    ------
    ConditionsError
        If something it names cannot be imported there.
    """
    try:
        workload = pickle.loads(payload)
    except Exception as error:  # as above, and whatever an import raises
        raise ConditionsError(
            f"a worker process cannot load the conditions or the solver ({type(error).__name__}: {error}). "
            "Accepted are functions and classes that the worker can import: put them into a module that is "
            "installed or on PYTHONPATH, or install cloudpickle on both sides."
        ) from error
    assert isinstance(workload, Workload)
    return workload


def pack_report(report: SampleReport) -> bytes:
    """A report as bytes; what cannot travel in it becomes text."""
    try:
        payload = pickle.dumps(report)
        pickle.loads(payload)  # an exception may pickle, and then not load
    except Exception:  # as above: the report must arrive, as text if need be
        error = report.error
        note = None if error is None else RuntimeError(f"{type(error).__name__}: {error}")
        aux = {name: repr(value) for name, value in report.aux.items()}
        payload = pickle.dumps(replace(report, error=note, aux=aux))
    return payload
