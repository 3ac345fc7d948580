"""What is alive, what was computed, and how large it was."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """While active, count ops, note how large their results are, and which of these still live.

    A storage that only the C++ side of a graph holds is seen too.

    Attributes
    ----------
    count : Counter
        Calls by the name of the op.
    sizes : Counter
        How many new storages there were of each number of elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self._storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count[func.overloadpacket.__name__] += 1
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if _address(tensor) not in given:  # neither an alias nor written in place
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        known = self._storages.get(storage.cdata)
        if known is None or known.expired():
            self._storages[storage.cdata] = storage
            self.sizes[tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)] += 1

    @property
    def largest(self) -> int:
        """Elements of the largest storage that was made."""
        return max(self.sizes, default=0)

    def alive(self) -> int:
        """How many of the storages made so far still live."""
        return sum(not storage.expired() for storage in self._storages.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def tensors_alive() -> int:
    """New tensors that Python knows of."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing in a reference cycle is freed within."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
