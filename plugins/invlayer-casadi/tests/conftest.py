"""The same state before and after each test, and what the libraries themselves warn of."""

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # torch compiles its forward-mode decompositions by torch.jit.script, which it has deprecated (2.13).
    config.addinivalue_line(
        "filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning:torch.jit._script"
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every generator that a test may draw from."""
    np.random.seed(0)
    torch.manual_seed(0)
