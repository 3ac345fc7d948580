"""Every test starts from the same seed, and leaves no global state behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad


def pytest_configure(config: pytest.Config) -> None:
    # torch loads its forward-mode decompositions on first use, and compiles them by torch.jit.script, which
    # torch itself has deprecated (2.13). The warning is torch's own, and of no concern to a user of invlayer.
    config.addinivalue_line(
        "filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning:torch.jit._script"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--with-plugins",
        metavar="DISTRIBUTIONS",
        help="comma-separated: tests that need another plugin than these are deselected",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = config.getoption("--with-plugins")
    if given is None:
        return
    installed = set(given.split(","))
    needed = {item: {name for mark in item.iter_markers("plugin") for name in mark.args} for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not needed[item] <= installed])
    items[:] = [item for item in items if needed[item] <= installed]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every generator that a test may draw from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _global_state() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "transforms": torch._C._functorch.peek_interpreter_stack(),
        "forward-mode level": forward_ad._current_level,
        "function modes": torch._C._len_torch_function_stack(),
        "NumPy error state": np.geterr(),
    }


@pytest.fixture(autouse=True)
def leaves_no_state() -> Iterator[None]:
    """Fail a test after which a global setting of torch or NumPy is another than before."""
    before = _global_state()
    yield
    assert _global_state() == before


@pytest.fixture
def float64(leaves_no_state: None) -> Iterator[None]:
    """Make float64 the default dtype of one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
