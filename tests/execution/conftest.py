"""What every test of how a batch runs needs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find the modules of the tests, wherever pytest was started."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
