"""Every test compiles afresh; torch's own warnings while it compiles are no concern of ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo


@pytest.fixture(autouse=True)
def compiled_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/compile/" in item.path.as_posix():
            # Behind a graph break Dynamo looks at `.grad` of tensors that are no leaves, and torch.jit at import.
            item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"))
            item.add_marker(
                pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
            )
