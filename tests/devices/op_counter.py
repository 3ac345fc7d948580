"""Count what makes a device wait for the host: reads of values, and copies from one device to another.

What it sees is the stream of ops. ``.tolist()`` and ``.numpy()`` of CPU tensors are no ops, and what a kernel
does inside (SVD on CUDA looks at its own error code) is not in the stream either.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import invlayer_core

OUTSIDE = "outside the package"
_ROOT = str(Path(invlayer_core.__file__).parent)

_READS = (
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_linalg_check_errors"),
    *("unique_consecutive", "unique_dim", "_unique2", "bincount"),
)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class HostTraffic(TorchDispatchMode):
    """While active, note every op that waits for the device, by the module of the package that asked for it.

    Attributes
    ----------
    reads : Counter
        How often each module had the host look at values.
    copies : list of (module, from, to, shape)
        Copies between two devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: list[tuple[str, str, str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS or (name in _INDEXING and _has_mask(args[1])):
            self.reads[_asking_module()] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                ends = source.device.type, result.device.type
                self.copies.append((_asking_module(), *ends, tuple(source.shape)))
        return result


def _has_mask(indices: Any) -> bool:
    leaves = _pytree.tree_leaves(indices)
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves)


def _asking_module() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_ROOT):
            return Path(file).relative_to(_ROOT).with_suffix("").as_posix()
        frame = frame.f_back
    return OUTSIDE
