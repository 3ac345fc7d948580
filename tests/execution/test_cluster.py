"""The same batch on a Dask cluster: two worker processes, one of which may be killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.execution.systems import SICK, Relaxation, batch, cubic

import invlayer_core as inv

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with cluster, distributed.Client(cluster) as client:
        yield client


def solve(client: Any, solver: inv.Solver, **keywords: Any) -> Any:
    y0, a = batch(60)
    return inv.root(
        cubic, y0, a, solver=solver, executor=client.get_executor(retries=0), on_failure="nan",
        return_info=True, **keywords,
    )  # fmt: skip


def expected() -> torch.Tensor:
    y0, a = batch(60)
    return inv.root(cubic, y0, a, solver=Relaxation(), batch="serial")


def test_equals_serial_bitwise(client: Any) -> None:
    y, info = solve(client, Relaxation())
    assert torch.equal(y, expected())
    assert info.batch == "executor"


def test_closures_travel(client: Any) -> None:
    y0, a = batch(60)
    factor = 0.1
    y = inv.root(
        lambda y, a: y + factor * y * y * y - a, y0, a, solver=Relaxation(), executor=client.get_executor()
    )
    assert torch.equal(y, expected())


def test_a_sample_that_loops_is_stopped(client: Any) -> None:
    _, info = solve(client, Relaxation("loops"), timeout=1.5)
    assert [i for i, status in enumerate(info.status) if not status.ok] == [SICK]
    assert info.status[SICK] is inv.Status.TIMED_OUT


def test_a_worker_that_is_killed_loses_nothing(client: Any, tmp_path: Path) -> None:
    y, _ = solve(client, Relaxation("is_killed_once", str(tmp_path / "killed")))
    assert torch.equal(y, expected())


def test_a_sample_that_kills_its_worker_is_reported_alone(client: Any) -> None:
    dask = pytest.importorskip("dask")
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        y, info = solve(client, Relaxation("dies"))
    assert [i for i, status in enumerate(info.status) if not status.ok] == [SICK]
    assert "the worker was lost again" in info.message[SICK]
    assert torch.equal(y[SICK + 1 :], expected()[SICK + 1 :])
