"""The one place that touches private functorch APIs of torch.

The engine must know three things that torch keeps private: whether a ``torch.func`` transform is
running, how many forward-mode levels are nested, and what plain values stand behind a wrapped tensor
(only those can decide whether to raise). Checked against torch 2.6 to 2.13.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as _C

__all__ = [
    "NOTHING",
    "above_autograd",
    "apply",
    "current_level",
    "forward_mode_depth",
    "gradients",
    "gradients_in_batch",
    "has_tangent",
    "in_forward_mode",
    "is_active",
    "is_mapped_by_autograd",
    "is_same_memory",
    "is_wrapped",
    "level_of",
    "levels_mapped_by_autograd",
    "map_again",
    "mapped_first",
    "own_saved_tensors",
    "plain",
    "revive",
    "transform_depth",
    "with_cached_signature",
]

NOTHING: AbstractContextManager[None] = nullcontext()
"""For ``with``, where there is nothing to change; one for all, as making one costs more than entering it."""

_ENGINE = torch.autograd.Variable._execution_engine

FunctionClass = TypeVar("FunctionClass", bound=type[torch.autograd.Function])


def with_cached_signature(cls: FunctionClass) -> FunctionClass:
    """Class decorator: work out the signature of ``forward`` once instead of at every ``apply``.

    ``Function.apply`` calls ``inspect.signature(cls.forward)`` each time, which costs as much as the whole
    of a small forward; ``inspect`` takes a ready ``__signature__`` where there is one.
    """
    cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return cls


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, by the short way where no ``torch.func`` transform is running.

    The long way first binds the arguments to the signature of ``forward``, to fill in defaults that the
    functions of this package do not have; that takes longer than the rest.
    """
    if is_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with the graph kept, and None for an input that is not reached.

    It goes straight to torch's engine: ``torch.autograd.grad`` first checks and prepares its arguments in
    Python, which for a small graph takes as long as the pass itself. Modes that watch torch functions, such
    as those of ``captured.py``, have to see the call, and get it.
    """
    if torch._C._len_torch_function_stack():
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    result: tuple[Tensor | None, ...] = _ENGINE.run_backward(
        tuple(outputs), tuple(cotangents), True, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return result


def gradients_in_batch(
    output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """:func:`gradients` for every one of ``cotangents`` ``(k, *output)`` in one pass: ``(k, *input)`` each.

    What ``is_grads_batched=True`` does, of which torch's own preparations take longer than a small pass.
    """
    level = torch._C._vmapmode_increment_nesting()
    try:
        mapped = torch._add_batch_dim(cotangents, 0, level)
        rows = gradients((output,), inputs, (mapped,), create_graph)
        size = cotangents.shape[0]
        return tuple(None if row is None else torch._remove_batch_dim(row, level, size, 0) for row in rows)
    finally:
        torch._C._vmapmode_decrement_nesting()


def _interpreter_names() -> list[str]:
    """Names of the running transforms, outermost first, such as ``["Vmap", "Grad"]``."""
    return [interpreter.key().name for interpreter in _C.get_interpreter_stack() or []]


def is_active() -> bool:
    """Whether any ``torch.func`` transform is running."""
    return _C.peek_interpreter_stack() is not None


def current_level() -> int:
    """The level of the innermost running transform; 0 if none is."""
    innermost = _C.peek_interpreter_stack()
    return 0 if innermost is None else int(innermost.level())


def transform_depth() -> int:
    """How many derivative transforms (reverse or forward) are nested."""
    return sum(name in ("Grad", "Jvp") for name in _interpreter_names())


def forward_mode_depth() -> int:
    """How many forward-mode transforms are nested."""
    if not is_active():
        return 0
    return _interpreter_names().count("Jvp")


def is_wrapped(tensor: Tensor) -> bool:
    """Whether ``tensor`` belongs to a running transform."""
    return bool(_C.is_functorch_wrapped_tensor(tensor))


def level_of(tensor: Tensor) -> int:
    """The transform level that ``tensor`` belongs to; 0 for a plain tensor."""
    return max(0, int(_C.maybe_get_level(tensor))) if is_wrapped(tensor) else 0


def in_forward_mode() -> bool:
    """Whether a level of eager forward mode (``torch.autograd.forward_ad``) is open."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def has_tangent(tensor: Tensor) -> bool:
    """Whether ``tensor`` carries a tangent of eager forward mode."""
    if is_active() or not in_forward_mode():  # torch.func opens such a level too, for its own jvp
        return False
    if is_mapped_by_autograd(tensor):  # a mapped direction, which torch makes without one
        return False
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def is_mapped_by_autograd(tensor: Tensor) -> bool:
    """Whether ``tensor`` is mapped by ``autograd.grad(..., is_grads_batched=True)``, not by torch.func."""
    return bool(_C.is_legacy_batchedtensor(tensor))


def revive(tensors: Sequence[Any]) -> list[Any]:
    """The tensors behind wrappers whose transform has been left.

    A vjp is usually called after the transform that made it has ended; what its ctx saved is wrapped for
    a level that no longer exists, or that has been given to another transform since.
    """
    return [None if t is None else _C.unwrap_if_dead(t) for t in tensors]


def mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``tensor`` with its mapped dimension in front, where it is one more batch dimension."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def is_same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one piece of memory, looked at in the same way and not written to in between.

    (``Tensor.is_set_to`` and ``data_ptr`` ask more of a device.)
    """
    return (
        tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        and tensor.storage_offset() == other.storage_offset()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor._version == other._version
    )


def own_saved_tensors() -> AbstractContextManager[None]:
    """Keep hooks such as those of ``checkpoint`` away from graphs that live and die inside a solve."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return NOTHING
    return torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _unmap(tensor: Tensor) -> Tensor:
    """``tensor`` with the dimension that autograd maps in front.

    Its level cannot be asked for: torch counts levels per thread, and a device has a backward thread of its
    own. A level that is not the tensor's leaves it mapped.
    """
    level = 1
    while is_mapped_by_autograd(unmapped := torch._remove_batch_dim(tensor, level, 1, 0)):
        level += 1
    return unmapped


def levels_mapped_by_autograd(tensor: Tensor) -> tuple[int, ...]:
    """The level at which ``is_grads_batched`` maps ``tensor``; empty if it does not."""
    if not is_mapped_by_autograd(tensor):
        return ()
    level = 1
    while is_mapped_by_autograd(torch._remove_batch_dim(tensor, level, 1, 0)):
        level += 1
    return (level,)


def map_again(tensor: Tensor, levels: Sequence[int]) -> Tensor:
    """``tensor`` with its leading dimension mapped at these levels, as autograd does it."""
    for level in levels:
        tensor = torch._add_batch_dim(tensor, 0, level)
    return tensor


def plain(tensor: Tensor) -> Tensor:
    """The values behind a wrapped tensor, mapped dimensions first (outermost first), without gradient."""
    while True:
        if _C.is_functorch_wrapped_tensor(tensor):
            batch_dim = int(_C.maybe_get_bdim(tensor)) if _C.is_batchedtensor(tensor) else -1
            tensor = _C.get_unwrapped(tensor)
            if batch_dim >= 0:
                tensor = tensor.movedim(batch_dim, 0)
        elif is_mapped_by_autograd(tensor):
            tensor = _unmap(tensor)
        else:
            return tensor.detach()


@contextmanager
def above_autograd() -> Iterator[None]:
    """Inside a custom operator, where torch has switched autograd off, switch it on again."""
    included = torch._C._dispatch_tls_local_include_set()
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(included, nothing):
        yield
