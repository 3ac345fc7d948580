"""What comes in from the user's world: checks at the door, working precision, NumPy functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError

__all__ = [
    "NumpyFunction",
    "check_devices",
    "check_unknown",
    "from_numpy",
    "is_real_tensor",
    "outside_inference_mode",
    "working_precision",
]


def is_real_tensor(value: Any) -> bool:
    """Whether ``value`` is what the spine works on as it is: one tensor of real floating-point dtype."""
    return isinstance(value, Tensor) and value.is_floating_point()


def check_unknown(called: str, name: str, tensor: Any) -> None:
    """Refuse what cannot be an unknown: not a tensor, integer, or complex.

    Raises
    ------
    ConditionsError
        Naming what came.
    """
    if not isinstance(tensor, Tensor):
        raise ConditionsError(
            f"{called}: {name} is a {type(tensor).__name__}; accepted is a real floating-point torch.Tensor. "
            f"Use torch.as_tensor({name}, dtype=torch.float64)."
        )
    if tensor.is_complex():
        raise ConditionsError(
            f"{called}: {name} has dtype {tensor.dtype}; accepted are real dtypes. Split complex unknowns "
            "into real and imaginary parts with torch.view_as_real, and join them inside f with "
            "torch.view_as_complex."
        )
    if not tensor.is_floating_point():
        raise ConditionsError(
            f"{called}: {name} has dtype {tensor.dtype}; accepted are floating-point dtypes. "
            f"Use {name}.double()."
        )


def check_devices(called: str, y0: Tensor, tensors: Sequence[Tensor]) -> None:
    """Refuse args on another device than y0 (scalars on the CPU go with every device).

    Raises
    ------
    ConditionsError
        Naming both devices.
    """
    for position, tensor in enumerate(tensors):
        scalar_on_host = tensor.ndim == 0 and tensor.device.type == "cpu"
        if tensor.device != y0.device and not scalar_on_host:
            raise ConditionsError(
                f"{called}: y0 is on {y0.device} but tensor {position} of args (shape {tuple(tensor.shape)}) "
                f"is on {tensor.device}; accepted is one device. Use .to({str(y0.device)!r})."
            )


def working_precision(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32 (differentiably), everything else as it is.

    Half precision cannot carry a solve: LU does not exist for it, and 1e-3 is its rounding error.
    """
    if tensor.is_inference():  # such a tensor cannot take part in any derivative, not even of the solver's
        with outside_inference_mode():
            tensor = tensor.clone()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def outside_inference_mode() -> AbstractContextManager[None]:
    """Where inference mode is on, plain ``no_grad``: inside inference mode no Jacobian can be taken."""
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else _functorch.NOTHING


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


@final
@dataclass(frozen=True)
class NumpyFunction:
    """A NumPy function as a function of tensors, without gradient."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        like = next((leaf for leaf in _pytree.tree_leaves(args) if _is_inexact(leaf)), None)
        result = self.function(*_pytree.tree_map(_to_numpy, args))
        if type(result) is tuple and len(result) == 2:
            return _to_tensors(result[0], like), result[1]
        return _to_tensors(result, like)

    def as_tensors(self, result: Any) -> Any:
        """What a call returned, where its second item turned out to be no aux but a part of y."""
        return _to_tensors(result, next(filter(_is_inexact, _pytree.tree_leaves(result)), None))


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _to_numpy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float64 if value.is_floating_point() else value.dtype
    dtype = torch.complex128 if value.is_complex() else dtype
    return value.detach().to("cpu", dtype, copy=True).resolve_conj().resolve_neg().numpy()


def _to_tensors(value: Any, like: Tensor | None) -> Any:
    return _pytree.tree_map(lambda leaf: _to_tensor(leaf, like), value, is_leaf=_is_one_array)


def _is_one_array(value: Any) -> bool:
    """Whether a list or tuple is numbers, which stand for one array, and not several arrays."""
    if type(value) not in (list, tuple):
        return False
    return not any(
        isinstance(leaf, Tensor) or getattr(leaf, "ndim", 0) for leaf in _pytree.tree_leaves(value)
    )


def _to_tensor(value: Any, like: Tensor | None) -> Tensor:
    tensor = torch.as_tensor(value)
    if like is None:
        return tensor
    dtype = like.dtype.to_complex() if tensor.is_complex() else like.dtype.to_real()
    return tensor.to(like.device, dtype)


def from_numpy(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a NumPy function stand where a torch solver function is expected.

    Parameters
    ----------
    fn : callable
        Takes float64 or complex128 arrays (private copies) for tensors, also for those in a pytree, and
        other arguments as they are; returns y, or ``(y, aux)``. Where y is a pytree, its leaves are arrays.

    Returns
    -------
    callable
        Takes tensors; returns y in the dtype and on the device of the first floating-point one.

    Examples
    --------
    >>> import numpy, torch
    >>> from_numpy(numpy.arcsin)(torch.tensor([0.5]))
    tensor([0.5236])
    """
    return NumpyFunction(fn)
