"""The systems here are tiny: a second thread only adds noise, and waiting."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def only_new_objects() -> Iterator[None]:
    """Spare the collector what pytest and torch have made so far: it is looked through many times here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread(leaves_no_state: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
