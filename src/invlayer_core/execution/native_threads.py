"""One thread for BLAS and torch while several solves run side by side: more would fight for the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

__all__ = ["core_count", "single_native_thread"]


def core_count() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def single_native_thread() -> Iterator[None]:
    """Cap the threads of torch, and of the BLAS libraries where threadpoolctl is installed; then restore."""
    before = torch.get_num_threads()
    with _blas_limit():
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _blas_limit() -> Any:
    try:
        limits = import_module("threadpoolctl").threadpool_limits
    except ImportError:
        return nullcontext()
    return limits(limits=1)
