"""A device that is not there: torch's own rules of where tensors live, on values that are real.

``FakeTensorMode`` knows the shape, dtype and device of every tensor and refuses to mix devices, as a CUDA
build does. But it has no values, so that the first ``bool(tensor)`` stops it. Here every op also runs on the
CPU tensors that hold the values: host decisions get their true answer, and the numbers can be compared with
those of a plain CPU run.

Registering the device renames global state of torch: only a process of its own may do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.devices.op_counter import Copy, copies_made
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils import _pytree

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


def register(name: str) -> None:
    """Make ``name`` a device of this process; ``meta`` is one already, and obeys the same rules.

    Raises
    ------
    ImportError
        If this torch cannot register a device from Python.
    """
    if name == "meta":
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=name)


class FakeDevice(FakeTensorMode):
    """While active, ``device=`` may name the device that is not there.

    Attributes
    ----------
    copies : list of Copy
        Those between devices, from every thread that touched a tensor of the mode.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # a plain tensor is one on the CPU
        self.copies: list[Copy] = []

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map(self._taken_in, (args, dict(kwargs or {})))
        values = _run_on_values(func, args, kwargs)
        if func in _READS:
            return values
        try:
            result = super().dispatch(func, types, args, kwargs)
        except DynamicOutputShapeException:  # nonzero, x[mask]: only the values tell the shape
            result = self._shaped_like(values, args[0].device)
        for fake, held in zip(_pytree.tree_leaves(result), _pytree.tree_leaves(values), strict=True):
            if isinstance(fake, FakeTensor):
                fake.held = held  # type: ignore[attr-defined]
        self.copies += copies_made(func, args, result)
        return result

    def _taken_in(self, leaf: Any) -> Any:
        """Forward mode has zero tensors without memory, which torch makes behind the back of every mode."""
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor) or not leaf._is_zerotensor():
            return leaf
        with self:
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)

    def _shaped_like(self, values: Any, device: torch.device) -> Any:
        with self:
            return _pytree.tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), values)


def _run_on_values(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C._DisableTorchDispatch():
        args, kwargs = _pytree.tree_map(_on_cpu, (args, kwargs))
        return _pytree.tree_map(_materialised, func(*args, **kwargs))


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return value_of(leaf) if isinstance(leaf, Tensor) else leaf


def _materialised(leaf: Any) -> Any:
    """The zero tensors of forward mode as plain ones: many kernels do not know that they lack memory."""
    if isinstance(leaf, Tensor) and leaf._is_zerotensor():
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    return leaf


def value_of(tensor: Tensor) -> Tensor:
    """The CPU tensor that holds the values of ``tensor``."""
    return tensor.held if isinstance(tensor, FakeTensor) else tensor  # type: ignore[attr-defined]


def _numpy(tensor: Tensor) -> Any:
    """``Tensor.numpy`` as on a real device: only tensors on the CPU have an array."""
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} tensor to numpy; copy it to the CPU first")
    with torch._C._DisableTorchDispatch():
        return value_of(tensor).numpy()


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """The mode, with ``Tensor.numpy`` and ``torch.tensor(..., device=)`` in order."""
    FakeTensor.numpy = _numpy  # type: ignore[method-assign]
    torch._C._set_only_lift_cpu_tensors(True)  # as FakeTensorMode does for CUDA: make it here, then copy it
    try:
        with FakeDevice() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        del FakeTensor.numpy
