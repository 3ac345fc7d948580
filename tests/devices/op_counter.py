"""Count what makes a device wait for the host: reads of values, and copies from one device to another.

What it sees is the stream of ops. ``.tolist()`` and ``.numpy()`` of CPU tensors are no ops, and what a kernel
does inside (SVD on CUDA looks at its own error code) is not in the stream either.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import invlayer_core

OUTSIDE = "outside"

_ROOT = str(Path(invlayer_core.__file__).parent)
_READS = (
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_linalg_check_errors"),
    *("unique_consecutive", "unique_dim", "_unique2", "bincount"),
)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_COPIES = {"_to_copy": 0, "copy_": 1}  # where the source stands among the args


class Copy(NamedTuple):
    """One copy between devices: which part of the package asked for it, from where, to where, what shape."""

    station: str
    source: str
    target: str
    shape: tuple[int, ...]


class HostTraffic(TorchDispatchMode):
    """While active, note every op that waits for the device.

    Attributes
    ----------
    reads : Counter
        How often each station of the package had the host look at values.
    copies : list of Copy
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: list[Copy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _READS or (name in _INDEXING and _has_mask(args[1])):
            self.reads[_station()] += 1
        self.copies += copies_made(func, args, result)
        return result


def copies_made(func: Any, args: Any, result: Any) -> list[Copy]:
    """The copy between devices that an op was, if it was one."""
    position = _COPIES.get(func.overloadpacket.__name__)
    if position is None or args[position].device == result.device:
        return []
    source = args[position]
    return [Copy(_station(), source.device.type, result.device.type, tuple(source.shape))]


def _has_mask(indices: Any) -> bool:
    return any(isinstance(leaf, Tensor) and not leaf.dtype.is_signed for leaf in _pytree.tree_leaves(indices))


def _station() -> str:
    """The part of the package, such as ``linear``, whose code is nearest on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_ROOT):
            return Path(file).relative_to(_ROOT).parts[0].removesuffix(".py")
        frame = frame.f_back
    return OUTSIDE
